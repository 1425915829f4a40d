"""What is tried, and how one try is timed."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import attrs

from powertrain.roles.files import Transfer
from powertrain_offload.io.engine import Engine
from powertrain_offload.io.kinds import open_engine
from powertrain_offload.io.settings import DEPTH, THREADS

BLOCKS = (256 << 10, 1 << 20, 4 << 20)
DEPTHS = (8, 32, 128)
CREWS = (2, 4, 8)
CHUNK = 16 << 20
"""Bytes of one transfer; a file is moved in as many as it takes, several under way."""


@attrs.frozen
class Choice:
    """An engine and how it cuts.

    Attributes:
        engine: "uring", "direct" or "threads".
        block: bytes.
        at_once: blocks under way: the depth of "uring", the threads of the others.
    """

    engine: str
    block: int
    at_once: int

    @property
    def depth(self) -> int:
        """What ``open_engine`` takes as ``depth``."""
        return self.at_once if self.engine == "uring" else DEPTH

    @property
    def threads(self) -> int:
        """What ``open_engine`` takes as ``threads``."""
        return THREADS if self.engine == "uring" else self.at_once

    def open(self) -> Engine:
        """Open it."""
        return open_engine(self.engine, block=self.block, depth=self.depth, threads=self.threads)


@attrs.define
class Speed:
    """Bytes a second that were found, of each round.

    Attributes:
        writes: with the time that it took to force them to the disk.
        reads: from the disk.
    """

    writes: list[float] = attrs.field(factory=list)
    reads: list[float] = attrs.field(factory=list)

    @property
    def write(self) -> float:
        """The median; 0 before the first round."""
        return statistics.median(self.writes) if self.writes else 0.0

    @property
    def read(self) -> float:
        """The median; 0 before the first round."""
        return statistics.median(self.reads) if self.reads else 0.0

    @property
    def both(self) -> float:
        """Bytes a second of reading everything and writing it back: what state that rests on a disk costs."""
        return 2 / (1 / self.write + 1 / self.read) if self.write and self.read else 0.0


def choices(kinds: Sequence[str], room: int) -> list[Choice]:
    """Return what is to be tried, of these kinds, with no more under way than memory has room for."""
    return [
        Choice(kind, block, count)
        for kind in kinds
        for block in BLOCKS
        for count in (DEPTHS if kind == "uring" else CREWS)
        if block * count <= room
    ]


def timed(engine: Engine, path: str, memory: memoryview, size: int, told: Callable[[], None]) -> tuple[float, float]:
    """Write the whole file and read it; return bytes a second of each.

    Args:
        engine: moves it.
        path: of the file.
        memory: what is written and read into, over and over.
        size: of the file, a multiple of ``CHUNK``.
        told: called after each chunk, and may raise.
    """
    with engine.open(path, "update") as file:
        started = time.perf_counter()
        _through(file.write, memory, size, told)
        file.sync()
        middle = time.perf_counter()
        if not file.direct:
            _forget(path)
        begun = time.perf_counter()
        _through(file.read, memory, size, told)
        ended = time.perf_counter()
    return size / (middle - started), size / (ended - begun)


def _through(
    start: Callable[[int, memoryview], Transfer], memory: memoryview, size: int, told: Callable[[], None]
) -> None:
    moves: deque[Transfer] = deque()
    room = len(memory) // CHUNK
    for number in range(size // CHUNK):
        if len(moves) == room:
            moves.popleft().wait()
            told()
        at = number % room * CHUNK
        moves.append(start(number * CHUNK, memory[at : at + CHUNK]))
    while moves:
        moves.popleft().wait()
        told()


def _forget(path: str) -> None:
    """Drop what the page cache has of a file, or reading would measure memory."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
