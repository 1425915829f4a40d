"""Starts the ranks of one contender in its own environment and reads what they measured."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zero_bench.contenders import CONTENDERS
from zero_bench.model import MICRO_BATCH, SIZES

RANKS = 2
BENCHMARKS = Path(__file__).parents[1]
PEERS = BENCHMARKS.parent / ".peers" / "deepspeed"


@dataclass(frozen=True)
class Setting:
    """What a table of contenders has in common."""

    model: str
    precision: str
    accumulation: int

    def __str__(self) -> str:
        return f"{self.model}, {self.precision}, accumulation {self.accumulation}"


@dataclass(frozen=True)
class Plan:
    """How long each run is, and whether a step is profiled after it."""

    steps: int
    warmup: int
    timeout: float
    profile: bool


@dataclass(frozen=True)
class Run:
    """What one launch measured.

    Attributes:
        step_seconds: median over the steps of the slower rank's time.
        update_seconds: the part of it that the update took, of the bound; else 0.
        peak_rss: bytes, of the rank that had most.
        bytes_at_update, bytes_after: of live tensors, of the rank that had most.
        losses: of each step, warm-up included, averaged over the ranks.
        error: why there is no measurement; the rest is then empty.
    """

    contender: str
    setting: Setting
    round: int
    step_seconds: float = 0.0
    update_seconds: float = 0.0
    peak_rss: int = 0
    start_rss: int = 0
    bytes_at_update: int | None = None
    bytes_after: int = 0
    losses: tuple[float, ...] = ()
    profile: str = ""
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def python_of(contender: str) -> Path:
    """Return the interpreter of the environment that the contender runs in."""
    return Path(sys.executable) if CONTENDERS[contender].ours else PEERS / "bin" / "python"


def missing(contenders: list[str]) -> str | None:
    """Say what to do when an environment that is needed is not there."""
    if all(CONTENDERS[name].ours for name in contenders) or (PEERS / ".ready").exists():
        return None
    return f"the peers are not installed in {PEERS}: run `make .peers/deepspeed/.ready`"


def tokens_a_step(setting: Setting) -> int:
    """Return the tokens that all ranks predict in one step."""
    return RANKS * MICRO_BATCH * setting.accumulation * SIZES[setting.model].sequence


def launch(contender: str, setting: Setting, number: int, plan: Plan) -> Run:
    """Run one contender once, on fresh processes; a failure is noted, not raised."""
    environment = {key: value for key, value in os.environ.items() if key != "LOCAL_SIZE"}
    environment |= {
        "PYTHONPATH": str(BENCHMARKS),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": environment.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    with tempfile.TemporaryDirectory(prefix="zero-bench-") as folder:
        command = [
            *(str(python_of(contender)), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"),
            *("-m", "zero_bench.worker", contender, "--model", setting.model, "--precision", setting.precision),
            *("--accumulation", str(setting.accumulation), "--steps", str(plan.steps)),
            *("--warmup", str(plan.warmup), "--out", folder, *(["--profile"] if plan.profile else [])),
        ]
        log = Path(folder) / "log"
        with log.open("w") as file:
            # A session of its own: Ctrl-C reaches this process alone, which then ends the ranks in an orderly way.
            process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(plan.timeout)
            except subprocess.TimeoutExpired:
                return Run(contender, setting, number, error=f"still running after {plan.timeout:g} s")
            finally:
                end(process)
        if status != 0:
            return Run(contender, setting, number, error=reason(log.read_text(errors="replace")))
        ranks = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    return summary(contender, setting, number, ranks)


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop what still runs: torchrun ends its ranks when it is asked to."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)  # torchrun gives its ranks 30 seconds
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reason(log: str) -> str:
    """Return the line of a failed run's log that says most: the first error that ended a rank."""
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line).strip() for line in log.splitlines()]
    # "some.module.SomeError: words"; torchrun's own last words only repeat that a rank died
    errors = [line for line in lines if re.match(r"[\w.]+: \S", line) and line[0].isalpha() and is_error(line)]
    return (errors or [line for line in lines if line.strip("=- ")] or ["no output"])[0 if errors else -1][:300]


def is_error(line: str) -> bool:
    """Say whether a line begins with the name of an exception that is not torchrun's."""
    name = line.partition(":")[0].rpartition(".")[2]
    return name[0].isupper() and name != "ChildFailedError" and "Warning" not in name


def summary(contender: str, setting: Setting, number: int, ranks: list[dict[str, Any]]) -> Run:
    """Join the ranks' reports: the slower rank's time of each step, the larger memory, the mean loss."""
    updates = [max(times) for times in zip(*(rank["update_seconds"] for rank in ranks), strict=True)]
    at_update = [rank["bytes_at_update"] for rank in ranks if rank["bytes_at_update"] is not None]
    return Run(
        contender,
        setting,
        number,
        step_seconds=statistics.median(map(max, zip(*(rank["seconds"] for rank in ranks), strict=True))),
        update_seconds=statistics.median(updates) if updates else 0.0,
        peak_rss=max(rank["peak_rss"] for rank in ranks),
        start_rss=max(rank["start_rss"] for rank in ranks),
        bytes_at_update=max(at_update, default=None),
        bytes_after=max(rank["bytes_after"] for rank in ranks),
        losses=tuple(map(statistics.fmean, zip(*(rank["losses"] for rank in ranks), strict=True))),
        profile=ranks[0].get("profile", ""),
    )
