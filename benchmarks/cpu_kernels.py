"""Adam on the processor beside torch's fused AdamW, DeepSpeedCPUAdam and what memory allows.

    python benchmarks/cpu_kernels.py [--parameters N] [--rounds 9] [--threads 1 2] [--no-deepspeed] [--json PATH]

All is fp32: a parameter costs 28 bytes, 16 read (value, gradient, two moments)
and 12 written. The floor moves as many, in the same proportion and in place,
with three plain torch passes on as many threads: value += gradient, and a
number added to each moment (12 + 8 + 8 bytes). It computes nothing, and none of our own code is in
it. It reads two arrays at a time where Adam reads four, so a kernel may come out a little above it or below.

Ours, torch and the floor share one process and the same memory; DeepSpeed has its
own environment and process. They take turns, and a figure is the median of the
rounds. `fused` also multiplies the gradients by a number first, as clipping does, and
writes the new values in bf16 too, all in one pass; the peers do each in a pass of its own.
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

ROOT = Path(__file__).parents[1]
PEER = ROOT / ".peers/deepspeed/bin/python"
WORKER = Path(__file__).parent / "cpu_kernels_worker.py"
BYTES = 28
"""That an update moves for each parameter."""

HERE = ("floor", "ours", "torch", "ours:fused", "torch:passes")
THERE = ("deepspeed", "deepspeed:passes")
BARS = (
    ("ours", "floor", 0.85),
    ("ours", "torch", 1.0),
    ("ours", "deepspeed", 1.0),
    ("ours:fused", "torch:passes", 1.3),
    ("ours:fused", "deepspeed:passes", 1.3),
)
"""What is held against what, and how many times as fast it must be."""


class Worker:
    """A process that times one thing at a time."""

    def __init__(self, python: str, kind: str, parameters: int) -> None:
        path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])  # where the peer finds ninja
        self.process = subprocess.Popen(
            [python, str(WORKER), kind, str(parameters)],
            env={**os.environ, "PATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if kind == "deepspeed" else None,
            text=True,
        )
        self._read()

    def time(self, what: str, threads: int) -> float:
        """Return the seconds that one update took."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {threads}\n")
        self.process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("= "):
                return line[2:].strip()
        raise RuntimeError(f"{self.process.args} ended")

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def measure(parameters: int, rounds: int, threads: list[int], deepspeed: bool) -> dict[int, dict[str, float]]:
    """Return the median seconds of everything, by the number of threads."""
    workers: list[tuple[Worker, tuple[str, ...]]] = []
    samples: dict[int, dict[str, list[float]]] = {count: {} for count in threads}
    try:
        workers.append((Worker(sys.executable, "ours", parameters), HERE))
        if deepspeed:
            workers.append((Worker(str(PEER), "deepspeed", parameters), THERE))
        for number in range(rounds + 1):
            for count in threads:
                for worker, plan in workers:
                    for what in plan:
                        seconds = worker.time(what, count)
                        if number:  # the first round touches the memory
                            samples[count].setdefault(what, []).append(seconds)
    finally:
        for worker, _ in workers:
            worker.close()
    return {n: {what: statistics.median(times) for what, times in found.items()} for n, found in samples.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parameters", type=int, default=120_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-deepspeed", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    deepspeed = not options.no_deepspeed
    if deepspeed and not PEER.exists():
        print("cpu_kernels.py: no .peers/deepspeed: `make .peers/deepspeed/.ready`, or --no-deepspeed", file=sys.stderr)
        return 2
    medians = measure(options.parameters, options.rounds, options.threads, deepspeed)
    for count, found in medians.items():
        for what, seconds in found.items():
            speed = options.parameters * BYTES / seconds / 1e9
            print(f"{count} threads  {what:<17}{seconds * 1e3:>9.2f} ms{speed:>8.2f} GB/s")
    bars = []
    for count, found in medians.items():
        for ours, other, least in BARS:
            if other in found:
                ratio = found[other] / found[ours]
                bars.append({"threads": count, "what": f"{ours} / {other}", "ratio": round(ratio, 3), "bar": least})
                verdict = "holds" if ratio >= least else "MISSED"
                print(f"{count} threads  {ours} / {other:<17}{ratio:>6.2f} of {least:.2f}  {verdict}")
    machine = {"date": date.today().isoformat(), "cores": os.cpu_count(), "machine": platform.machine()}
    machine |= {"python": platform.python_version(), "rounds": options.rounds, "parameters": options.parameters}
    print("GB/s at 28 bytes a parameter; " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "seconds": medians, "bars": bars}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
