"""Starts the ranks of one contender in its own environment, and asks them for steps."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from powertrain.testing.ports import free_port
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
class Run:
    """What one turn of one contender measured.

    Attributes:
        round: equal for the turns that followed each other at once.
        step_seconds: mean over the turn's steps of the slower rank's time.
        update_seconds: the part of it that the update took, of the bound; else 0.
        processor_seconds: of a step, on all threads of a rank, mean over the ranks.
        peak_rss: bytes, of the rank that had most.
        moved: bytes of a step to and from disks, of all ranks, where a contender counts them.
        bytes_at_update, bytes_after: of live tensors, of the rank that had most; None when it was not looked at.
        losses: of each step so far, averaged over the ranks.
        error: why there is no measurement; the rest is then empty.
    """

    contender: str
    setting: Setting
    round: int
    step_seconds: float = 0.0
    update_seconds: float = 0.0
    processor_seconds: float = 0.0
    peak_rss: int = 0
    start_rss: int = 0
    moved: int = 0
    bytes_at_update: int | None = None
    bytes_after: int | None = None
    losses: tuple[float, ...] = ()
    profile: str = ""
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


class Failed(Exception):
    """A contender's rank has ended, or does not answer."""


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


class Contestant:
    """The ranks of one contender: alive, and idle between their turns.

    Raises:
        Failed: they do not come up.
    """

    def __init__(self, name: str, setting: Setting, timeout: float) -> None:
        self.name = name
        self.losses: list[float] = []
        self._setting = setting
        self._timeout = timeout
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"zero-bench-{name}-", suffix=".log")  # noqa: SIM115
        self._channels: list[Connection[Any, Any]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        port = free_port()
        for rank in range(RANKS):
            self._start(rank, port)
        try:
            self.start_rss = max(report["start_rss"] for report in self._answers())
        except BaseException:
            self.end()
            raise

    def _start(self, rank: int, port: int) -> None:
        ours, theirs = Pipe()
        environment = {key: value for key, value in os.environ.items() if key != "LOCAL_SIZE"}
        environment |= {
            "PYTHONPATH": str(BENCHMARKS),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": environment.get("GLOO_SOCKET_IFNAME", "lo"),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **{key: str(RANKS) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
            **{key: str(rank) for key in ("RANK", "LOCAL_RANK")},
        }
        setting = self._setting
        command = [
            *(str(python_of(self.name)), "-m", "zero_bench.worker", self.name, "--model", setting.model),
            *("--precision", setting.precision, "--accumulation", str(setting.accumulation)),
            *("--channel", str(theirs.fileno())),
        ]
        # A session of its own: Ctrl-C reaches the benchmark alone, which then ends the ranks in an orderly way.
        self._processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        )
        theirs.close()
        self._channels.append(ours)

    def turn(self, steps: int, number: int) -> Run:
        """Let it take so many steps.

        Raises:
            Failed: a rank has ended, or does not answer.
        """
        reports = self._ask("steps", steps)
        self.losses += map(statistics.fmean, zip(*(report["losses"] for report in reports), strict=True))
        updates = [max(times) for times in zip(*(report["update_seconds"] for report in reports), strict=True)]
        return Run(
            self.name,
            self._setting,
            number,
            step_seconds=statistics.fmean(map(max, zip(*(report["seconds"] for report in reports), strict=True))),
            update_seconds=statistics.fmean(updates) if updates else 0.0,
            processor_seconds=statistics.fmean(report["processor_seconds"] for report in reports),
            peak_rss=max(report["peak_rss"] for report in reports),
            start_rss=self.start_rss,
            moved=sum(report["moved"] for report in reports),
        )

    def finish(self, *, profile: bool) -> dict[str, Any]:
        """Let it look at what it holds, and at where a step's time goes; returns fields of ``Run``.

        Raises:
            Failed: a rank has ended, or does not answer.
        """
        reports = self._ask("finish", profile)
        at_update = [report["bytes_at_update"] for report in reports if report["bytes_at_update"] is not None]
        return {
            "bytes_at_update": max(at_update, default=None),
            "bytes_after": max(report["bytes_after"] for report in reports),
            "profile": reports[0]["profile"],
        }

    def _ask(self, request: str, argument: Any) -> list[dict[str, Any]]:
        try:
            for channel in self._channels:
                channel.send((request, argument))
        except OSError:
            raise Failed(self._reason()) from None
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        limit = time.monotonic() + self._timeout
        answers = []
        for channel in self._channels:
            while not channel.poll(0.5):
                if any(process.poll() for process in self._processes):
                    raise Failed(self._reason())
                if time.monotonic() > limit:
                    raise Failed(f"no answer after {self._timeout:g} s")
            try:
                answers.append(channel.recv())
            except (EOFError, OSError):
                raise Failed(self._reason()) from None
        return answers

    def _reason(self) -> str:
        return reason(Path(self._log.name).read_text(errors="replace"))

    def end(self) -> None:
        """Stop what still runs."""
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            try:
                process.wait(0.1 if process.poll() is None and not self.losses else 20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._log.close()


def reason(log: str) -> str:
    """Return the line of a failed run's log that says most: the first error that ended a rank."""
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line).strip() for line in log.splitlines()]
    # "some.module.SomeError: words"
    errors = [line for line in lines if re.match(r"[\w.]+: \S", line) and line[0].isalpha() and is_error(line)]
    return (errors or [line for line in lines if line.strip("=- ")] or ["no output"])[0 if errors else -1][:300]


def is_error(line: str) -> bool:
    """Say whether a line begins with the name of an exception."""
    name = line.partition(":")[0].rpartition(".")[2]
    return name[0].isupper() and "Warning" not in name
