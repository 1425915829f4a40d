"""The file engines beside fio and DeepSpeed's aio, on the same file and the same kind of memory.

    python benchmarks/io.py [PATH] [--size 1GiB] [--rounds 7] [--no-deepspeed] [--json FILE]

Every contender lives at the same time and takes its turn in every round, first writing the whole file and then reading
it, with O_DIRECT; a figure is the median of the rounds. Writes include the fsync, except for fio, which does not count
its own. Of fio and DeepSpeed several settings run, and the best of each, for reads and for writes, is what counts; ours
are the defaults of `[offload]`, and beside them other settings.

All memory is of large pages (MADV_COLLAPSE), for on a virtual machine small ones decide the result. Beside fio, we use
the very same 128 MiB as it does, over and over. DeepSpeed moves a pinned tensor as long as the file in one call, and
beside it so do we ("whole"), from memory of `engine.buffer`. fio's time is that of its own clock, without its start.

fio and libaio-dev are installed with apt-get where this is root's; what is missing is told and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from powertrain_offload.io import available, raw, sweep
from powertrain_offload.io.engine import Engine
from powertrain_offload.io.scratch import scratch_file, scratch_memory
from powertrain_offload.io.settings import BLOCK, DEPTH, THREADS
from powertrain_offload.io.sizes import parse_size

ROOT = Path(__file__).parents[1]
PEER = ROOT / ".peers/deepspeed/bin/python"
WORKER = Path(__file__).parent / "io_deepspeed.py"
OURS = (
    sweep.Choice("uring", BLOCK, DEPTH),
    sweep.Choice("uring", 4 << 20, 32),
    sweep.Choice("direct", BLOCK, THREADS),
    sweep.Choice("direct", 4 << 20, 4),
)
PEERS = ((1, 8, 1), (1, 32, 1), (1, 32, 4), (8, 16, 4), (1, 128, 8))
"""DeepSpeed's block in MiB, queue depth and threads; the first are its defaults."""


class DeepSpeed:
    """Its aio, in a process of its own."""

    def __init__(self, path: str, size: int) -> None:
        self.process = subprocess.Popen(
            [str(PEER), str(WORKER), path, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PATH": f"{PEER.parent}:{os.environ['PATH']}", "MAX_JOBS": "2"},
        )

    def ask(self, line: str = "") -> str:
        """Say something and return the answer; empty when it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if line:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        for answer in self.process.stdout:
            if answer.startswith("= "):
                return answer[2:].strip()
        return ""

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


def install(package: str, there: bool) -> bool:
    """Install a package of the system's where that can be done; return whether it is there."""
    if there:
        return True
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing {package} …", file=sys.stderr, flush=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["apt-get", "update"], check=False, **quiet)
        if subprocess.run(["apt-get", "install", "-y", package], check=False, **quiet).returncode == 0:
            return True
    print(f"io.py: {package} is missing and cannot be installed by this user; going on without", file=sys.stderr)
    return False


def peer(wanted: bool, path: str, size: int) -> DeepSpeed | None:
    """Start DeepSpeed's aio; None where it cannot be had."""
    if not wanted:
        return None
    if not PEER.exists():
        print("io.py: no .peers/deepspeed: `make .peers/deepspeed/.ready`; going on without", file=sys.stderr)
        return None
    if not install("libaio-dev", Path("/usr/include/libaio.h").exists()):
        return None
    print("starting DeepSpeed (compiles its aio the first time) …", file=sys.stderr, flush=True)
    started = DeepSpeed(path, size)
    if started.ask() == "ready":
        return started
    started.process.kill()
    _, error = started.process.communicate()
    print(f"io.py: DeepSpeed's aio does not start; going on without:\n{error[-2000:]}", file=sys.stderr)
    return None


def measure(path: str, size: int, rounds: int, tool: str | None, deepspeed: DeepSpeed | None) -> dict[str, sweep.Speed]:
    """Return the speed of everything, by name."""
    found: dict[str, sweep.Speed] = {}

    def note(name: str, written: float | None, read: float | None, warm: bool) -> None:
        if written and read and not warm:
            speed = found.setdefault(name, sweep.Speed())
            speed.writes.append(written)
            speed.reads.append(read)

    with scratch_memory() as memory:
        engines: dict[str, Engine] = {}
        for choice in OURS:
            if available()[choice.engine] is None:
                unit = "depth" if choice.engine == "uring" else "threads"
                engines[f"ours {choice.engine}, {choice.block >> 20} MiB, {unit} {choice.at_once}"] = choice.open()
        whole = next(iter(engines.values())).buffer(size)
        for at in range(0, size, len(memory.view)):
            whole[at : at + len(memory.view)] = memory.view[: size - at]
        for number in range(rounds + 1):
            warm = number == 0  # the first round makes the file and touches the memory
            print(f"round {number} of {rounds} …", file=sys.stderr, flush=True)
            for name, engine in engines.items():
                note(name, *sweep.timed(engine, path, memory.view, size, lambda: None), warm)
                note(name.replace("ours", "whole"), *at_once(engine, path, whole), warm)
            for way in raw.ways(tool):
                both = [raw.speed(tool, way, writes, path, size, memory) for writes in (True, False)]
                note(way.name, *both, warm)
            for block, depth, threads in PEERS if deepspeed is not None else ():
                assert deepspeed is not None
                answer = deepspeed.ask(f"{block << 20} {depth} {threads}").split()
                seconds = [float(each) for each in answer]
                name = f"deepspeed {block} MiB, depth {depth}, threads {threads}"
                note(name, size / seconds[0], size / seconds[1], warm)
        for engine in engines.values():
            engine.close()
    return found


def at_once(engine: Engine, path: str, memory: memoryview) -> tuple[float, float]:
    """Write the file and read it, each in one transfer; return bytes a second of each."""
    with engine.open(path, "update") as file:
        started = time.perf_counter()
        file.write(0, memory).wait()
        file.sync()
        middle = time.perf_counter()
        file.read(0, memory).wait()
        return len(memory) / (middle - started), len(memory) / (time.perf_counter() - middle)


def best(found: dict[str, sweep.Speed], kind: str, doing: str) -> tuple[float, str]:
    """Return the best of a contender's settings, and which that was."""
    return max((getattr(speed, doing), name) for name, speed in found.items() if name.startswith(kind))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", nargs="?", default=str(ROOT), help="a directory on the disk to measure")
    parser.add_argument("--size", type=parse_size, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-deepspeed", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = max(options.size // sweep.CHUNK, 4) * sweep.CHUNK
    install("fio", shutil.which("fio") is not None)
    tool = raw.tool()
    with scratch_file(options.path, size) as path:
        with sweep.Choice("threads", BLOCK, 2).open() as engine, engine.open(path, "update") as file:
            file.resize(size)
        deepspeed = peer(not options.no_deepspeed, path, size)
        try:
            found = measure(path, size, options.rounds, tool, deepspeed)
        finally:
            if deepspeed is not None:
                deepspeed.close()
    rows = [(name, f"{speed.read / 1e9:.2f}", f"{speed.write / 1e9:.2f}") for name, speed in found.items()]
    cells = [("", "read GB/s", "write GB/s"), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2])]))
    ratios = {}
    first = next(iter(found))
    for kind in ("fio", "pread", "deepspeed"):
        if not any(name.startswith(kind) for name in found):
            continue
        way = "whole" if kind == "deepspeed" else "ours"
        default = first.replace("ours", way)
        for doing in ("read", "write"):
            limit, name = best(found, kind, doing)
            ours, chosen = getattr(found[default], doing), best(found, way, doing)
            ratios[f"{doing}/{kind}"] = round(ours / limit, 3)
            rounds = zip(getattr(found[default], f"{doing}s"), getattr(found[name], f"{doing}s"), strict=True)
            low, *_, high = sorted(mine / theirs for mine, theirs in rounds)
            print(
                f"{doing}: ours ÷ {kind}'s best = {ours / limit:.2f} (single rounds {low:.2f} to {high:.2f}; "
                f"our best setting {chosen[0] / limit:.2f}; {kind}'s best was {name!r})"
            )
    machine = {"date": date.today().isoformat(), "cores": os.cpu_count(), "kernel": platform.release()}
    machine |= {"python": platform.python_version(), "rounds": options.rounds, "MiB": size >> 20}
    machine |= {"fio": raw.version(tool) if tool else "none", "ours": first}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if options.json is not None:
        medians = {name: {"read": s.read, "write": s.write, "reads": s.reads, "writes": s.writes}
                   for name, s in found.items()}  # fmt: skip
        options.json.write_text(json.dumps({"machine": machine, "ratios": ratios, "bytes/s": medians}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
