"""How fast a checkpoint of 1 GB is saved and loaded, beside torch's ways and the disk itself.

All save the same state, with fsync, and load it cold: its files are dropped from the page cache before. Ranks hold
equal shares of it. In each round every way has its turn, fio among them, so that a busy moment hits all; medians are
compared. fio writes new files, as the others do, one per rank, past the page cache; the better of two shapes counts.

    python benchmarks/checkpoint.py [--ranks 1 2] [--rounds 7] [--gb 1] [--directory DIR]

``buffered`` is Powertrain without a file engine, ``dcp:N`` torch.distributed.checkpoint with N threads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

WAYS = ("powertrain", "buffered", "torch.save", "dcp:1", "dcp:2", "dcp:4")
SHAPES = (("1M", 32), ("8M", 8))
BOUNDS = {
    ("save", "fio"): 0.85,
    ("save", "torch.save"): 3.0,
    ("save", "dcp"): 1.5,
    ("load", "fio"): 0.85,
}
"""What ``powertrain`` must reach, in multiples of the others."""


class Ranks:
    """Processes that save and load together.

    Args:
        count: how many.
        root: where they keep their files.
        nbytes: of all their state.
        log: where they complain.
    """

    def __init__(self, count: int, root: Path, nbytes: int, log: IO[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        worker = Path(__file__).with_name("checkpoint_worker.py")
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(worker), str(root), str(nbytes)],
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )
            for rank in range(count)
        ]  # fmt: skip
        for process in self.processes:
            self._read(process)

    def time(self, what: str, way: str) -> float:
        """Return the seconds from the first rank's start to the last one's end; the host has one clock."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{what} {way}\n")
            process.stdin.flush()
        answers = [tuple(map(float, self._read(process).split())) for process in self.processes]
        return max(end for _, end in answers) - min(start for start, _ in answers)

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("= "):
                return line[2:].strip()
        raise SystemExit("a rank ended; what it said is above")

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait(60)


def fio(what: str, shape: tuple[str, int], root: Path, count: int, nbytes: int) -> float:
    """Return the seconds that fio takes to write new files, or to read them."""
    home = root / "fio"
    if what == "save":
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
    block, depth = shape
    command = ["fio", "--name=x", f"--directory={home}", f"--numjobs={count}", f"--size={nbytes // count}"]
    command += [f"--rw={'write' if what == 'save' else 'read'}", f"--bs={block}", f"--iodepth={depth}"]
    command += ["--direct=1", "--ioengine=io_uring", "--end_fsync=1", "--group_reporting", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return nbytes / float(job["write" if what == "save" else "read"]["bw_bytes"])


def install_fio() -> None:
    """Install fio where it is missing and this user may; else say what to do."""
    if shutil.which("fio") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        print("checkpoint.py: installing fio …", file=sys.stderr)
        subprocess.run(["apt-get", "install", "-y", "-qq", "fio"], check=False, stdout=subprocess.DEVNULL)
    if shutil.which("fio") is None:
        raise SystemExit("checkpoint.py: fio is not installed: `apt-get install fio`, or what your system has for it")


def measure(count: int, nbytes: int, rounds: int, root: Path) -> dict[tuple[str, str], list[float]]:
    """Return all seconds by what was done and how; a first round, which touches memory, is left out."""
    samples: dict[tuple[str, str], list[float]] = {}
    ranks = Ranks(count, root, nbytes, sys.stderr)
    turns: list[tuple[str, Callable[[str], float]]] = [
        (way, lambda what, way=way: ranks.time(what, way))
        for way in WAYS  # type: ignore[misc]
    ]
    for shape in SHAPES:
        turn = lambda what, shape=shape: fio(what, shape, root, count, nbytes)  # noqa: E731
        turns.append((f"fio {shape[0]} x {shape[1]}", turn))
    try:
        for number in range(rounds + 1):
            # Every second round the other way round: what comes after a way that leaves the disk busy differs.
            for way, turn in turns if number % 2 else reversed(turns):
                for what in ("save", "load"):
                    # A virtual disk may have an allowance that refills: nobody is to begin on what another has left.
                    time.sleep(1.0)
                    taken = turn(what)
                    if number:
                        samples.setdefault((what, way), []).append(taken)
    finally:
        ranks.close()
    return samples


def report(count: int, nbytes: int, samples: dict[tuple[str, str], list[float]]) -> bool:
    """Print the table of one number of ranks; return whether all bounds hold."""
    speeds = {key: [nbytes / taken / 1e9 for taken in times] for key, times in samples.items()}
    held = True
    print(f"{count} rank{'s' if count > 1 else ''}, {nbytes / 1e9:.2f} GB in all; GB/s: median (least to most)")
    for what in ("save", "load"):
        medians = {way: statistics.median(values) for (kind, way), values in speeds.items() if kind == what}
        for way, median in medians.items():
            least, most = min(speeds[what, way]), max(speeds[what, way])
            print(f"  {what}  {way:14} {median:6.2f}  ({least:.2f} to {most:.2f})")
        for other in ("fio", "torch.save", "dcp"):
            best = max(median for way, median in medians.items() if way.startswith(other))
            ratio, bound = medians["powertrain"] / best, BOUNDS.get((what, other))
            verdict = "" if bound is None else f", bound {bound}: {'met' if ratio >= bound else 'MISSED'}"
            print(f"  {what}  powertrain / {other}: {ratio:.2f}{verdict}")
            held &= bound is None or ratio >= bound
    return held


def main() -> int:
    """Measure, print the tables, and return 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gb", type=float, default=1.0, help="GiB of state")
    parser.add_argument("--directory", help="where to save; default: a temporary directory")
    options = parser.parse_args()
    install_fio()
    nbytes, held = int(options.gb * 2**30) // 2**20 * 2**20, True
    for count in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.directory) as root:
            held &= report(count, nbytes, measure(count, nbytes, options.rounds, Path(root)))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
