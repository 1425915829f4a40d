"""What the disk itself can do: by the plainest loop there is, and by fio where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs

from powertrain_offload.io.scratch import ROOM, Memory

PATIENCE = 600.0
"""Seconds that fio may take for one run."""

SHAPES = ((1 << 20, ROOM >> 20), (4 << 20, ROOM >> 22), (8 << 20, ROOM >> 23))
"""Block and depth, of which each needs all of the memory (fio cuts a file that it maps to what it needs)."""


@attrs.frozen
class Way:
    """One way to read and write the whole file past the page cache.

    Attributes:
        name: for people.
        engine: fio's; empty: our own loop.
        block: bytes.
        depth: blocks under way (of the loop: threads).
    """

    name: str
    engine: str
    block: int
    depth: int


def ways(tool: str | None) -> list[Way]:
    """Return what to try: a plain loop, and fio's engines where there is fio (its path)."""
    found = []
    for block, threads in ((4 << 20, 1), (1 << 20, 4), (4 << 20, 4)):
        name = f"pread/pwrite, {block >> 20} MiB, {threads} thread{'s' * (threads > 1)}"
        found.append(Way(name, "", block, threads))
    if tool is not None:
        for engine in engines(tool):
            found += [Way(f"fio {engine}, {b >> 20} MiB, depth {d}", engine, b, d) for b, d in SHAPES]
    return found


def tool() -> str | None:
    """Return where fio is; None if it is not installed, or has no engine that keeps several requests under way."""
    found = shutil.which("fio")
    return found if found and engines(found) else None


def engines(tool: str) -> list[str]:
    """Return those of fio's engines that keep several requests under way."""
    try:
        answer = subprocess.run([tool, "--enghelp"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [name for name in ("libaio", "io_uring") if name in answer.split()]


def version(tool: str) -> str:
    """Return what fio calls itself."""
    return subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=60).stdout.strip()


def speed(tool: str | None, way: Way, writes: bool, path: str, size: int, memory: Memory) -> float | None:
    """Return bytes a second; None where this way does not work here.

    Args:
        tool: fio's path.
        way: what to try.
        writes: rather than reads.
        path: of the file.
        size: of the file, in bytes.
        memory: that is written from and read into.
    """
    if way.engine and tool is not None:
        return _fio(tool, way, writes, path, size, memory)
    return _loop(way, writes, path, size, memory.view)


def _fio(tool: str, way: Way, writes: bool, path: str, size: int, memory: Memory) -> float | None:
    doing = "write" if writes else "read"
    command = [
        tool, "--name=raw", f"--filename={path}", f"--size={size}", f"--rw={doing}", f"--bs={way.block}",
        f"--iodepth={way.depth}", f"--ioengine={way.engine}", "--direct=1", "--thread", "--output-format=json",
    ]  # fmt: skip
    if writes:
        command.append("--end_fsync=1")
    if memory.path:
        command.append(f"--mem=mmapshared:{memory.path}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
        job: Any = json.loads(answer[answer.index("{") :])["jobs"][0]
    except (OSError, ValueError, LookupError, subprocess.SubprocessError):
        return None
    return float(job[doing]["bw_bytes"]) if not job["error"] else None


def _loop(way: Way, writes: bool, path: str, size: int, memory: memoryview) -> float | None:
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_DIRECT", 0))
    except OSError:
        return None
    room = len(memory) // way.block

    def move(first: int) -> None:
        for number in range(first, size // way.block, way.depth):
            at = number % room * way.block
            view = memory[at : at + way.block]
            if writes:
                os.pwritev(descriptor, [view], number * way.block)
            else:
                os.preadv(descriptor, [view], number * way.block)

    try:
        with ThreadPoolExecutor(way.depth) as pool:
            started = time.perf_counter()
            list(pool.map(move, range(way.depth)))
            if writes:
                os.fsync(descriptor)
            return size / (time.perf_counter() - started)
    except OSError:
        return None
    finally:
        os.close(descriptor)
