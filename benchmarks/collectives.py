"""Collectives through shared memory beside gloo, DeepSpeed's shared-memory all_reduce, and what memory allows.

    python benchmarks/collectives.py [--ranks 2 4] [--mb 1 16 64] [--rounds 9] [--no-deepspeed] [--json PATH]

Every contender lives at the same time and takes its turn in every round; a
figure is the median of the rounds. A turn goes through 64 MB, in as many messages
as that makes, each on tensors of its own. GB/s count the tensor once: the whole one
for all_reduce, the whole input of reduce_scatter, the whole output of
all_gather.

`gloo` is gloo's own, `chosen` the communicator over gloo with the algorithms that it measured on this host
(`[comm] algorithms`); which these are is told first. `any` are ordinary
tensors, `empty` those of `communicator.empty`; all_gather of the latter
is in place, as the sharded optimizer does it. The limit of an operation
is the time that the bytes it must read and write take at the bandwidth of
the plain torch operation that reads and writes in the same proportion, with as many ranks at it at
once: all_reduce, in place on half of each tensor (x.add_: 2 bytes moved a byte);
reduce_scatter, two inputs and one output (torch.add); all_gather, copy_. For more than two ranks the bytes
are those of (n - 1) peers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

from powertrain.testing.ports import free_port

ROOT = Path(__file__).parents[1]
PEER = ROOT / ".peers/deepspeed/bin/python"
WORKER = Path(__file__).parent / "collectives_worker.py"
WAYS = ("gloo", "chosen", "any", "empty")
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather")


class Ranks:
    """Some processes that time one thing at a time, all together."""

    def __init__(self, python: str, kind: str, count: int) -> None:
        port = free_port()
        self.processes = []
        for rank in range(count):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            numbers |= {"LOCAL_SIZE": count, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in numbers.items()}}
            log = subprocess.DEVNULL if kind == "deepspeed" else None
            self.processes.append(
                subprocess.Popen(
                    [python, str(WORKER), kind],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )
        for process in self.processes:
            self._read(process)

    def time(self, what: str, megabytes: float) -> float:
        """Return the seconds a message from the first rank's start to the last one's end; the host has one clock.

        Where ranks share cores, what each takes by its own clock leaves out the time for which it waited to start.
        """
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{what} {megabytes}\n")
            process.stdin.flush()
        answers = [self._read(process).split() for process in self.processes]
        first, last = min(float(answer[0]) for answer in answers), max(float(answer[1]) for answer in answers)
        return (last - first) / int(answers[0][2])

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("= "):
                return line[2:].strip()
        raise RuntimeError(f"{process.args} ended")

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def limits(count: int, times: dict[str, float]) -> dict[str, float]:
    """Return the seconds that each operation needs at the least, from what plain operations took.

    Args:
        count: ranks.
        times: of `rmw` (read and write the whole), `copy` (read and write the whole) and `add` (read the whole as
            two halves, write a half).
    """
    share = 1 / count
    return {
        # Each rank reads its share of all tensors, and writes it to all: as much as the whole read and written.
        "all_reduce": times["rmw"],
        # Reads its share of all, writes one share: `add` moves 1.5 of the whole, this moves 1 + 1 / n.
        "reduce_scatter": times["add"] * (1 + share) / 1.5,
        # Copies what it does not have.
        "all_gather": times["copy"] * (1 - share),
    }


def measure(count: int, megabytes: float, rounds: int, deepspeed: bool) -> dict[str, float]:
    """Return the median seconds of everything, for one number of ranks and one size."""
    groups = [("ours", Ranks(sys.executable, "ours", count))]
    if deepspeed:
        groups.append(("deepspeed", Ranks(str(PEER), "deepspeed", count)))
    plans = {
        "ours": [f"{where}:{name}" for name in OPERATIONS for where in WAYS]
        + [f"plain:{name}" for name in ("rmw", "add", "copy")],
        "deepspeed": ["deepspeed:all_reduce"],
    }
    samples: dict[str, list[float]] = {}
    try:
        for number in range(rounds + 1):
            for kind, ranks in groups:
                for what in plans[kind]:
                    seconds = ranks.time(what, megabytes)
                    if number:  # the first round touches the memory
                        samples.setdefault(what, []).append(seconds)
    finally:
        for _, ranks in groups:
            ranks.close()
    return {what: statistics.median(values) for what, values in samples.items()}


def rows(count: int, megabytes: float, medians: dict[str, float]) -> list[dict[str, object]]:
    """Return one row per operation."""
    size = megabytes * 2**20
    least = limits(count, {name: medians[f"plain:{name}"] for name in ("rmw", "add", "copy")})
    result = []
    for name in OPERATIONS:
        found = {where: size / medians[f"{where}:{name}"] / 1e9 for where in WAYS}
        peer = medians.get(f"deepspeed:{name}")
        result.append(
            {
                "ranks": count,
                "MB": megabytes,
                "operation": name,
                **{where: round(value, 2) for where, value in found.items()},
                "deepspeed": None if peer is None else round(size / peer / 1e9, 2),
                "limit": round(size / least[name] / 1e9, 2),
                "any/gloo": round(found["any"] / found["gloo"], 2),
                "empty/gloo": round(found["empty"] / found["gloo"], 2),
                "empty/limit": round(found["empty"] * least[name] * 1e9 / size, 2),
            }
        )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mb", type=float, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-deepspeed", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    deepspeed = not options.no_deepspeed
    if deepspeed and not PEER.exists():
        print("collectives.py: no .peers/deepspeed: `make .peers/deepspeed/.ready`, or --no-deepspeed", file=sys.stderr)
        return 2
    table: list[dict[str, object]] = []
    for count in options.ranks:
        for megabytes in options.mb:
            print(f"{count} ranks, {megabytes:g} MB …", file=sys.stderr, flush=True)
            table += rows(count, megabytes, measure(count, megabytes, options.rounds, deepspeed))
    heads = list(table[0])
    cells = [heads, *[["-" if row[head] is None else str(row[head]) for head in heads] for row in table]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    machine = {"date": date.today().isoformat(), "cores": os.cpu_count(), "machine": platform.machine()}
    machine |= {"python": platform.python_version(), "rounds": options.rounds}
    print("GB/s of tensor; " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "rows": table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
