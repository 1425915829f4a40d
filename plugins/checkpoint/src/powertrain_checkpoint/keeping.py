"""Memory in which a load keeps what it has verified, as long as that is quicker than to read it once more."""

from __future__ import annotations

import time

import torch

from powertrain.roles.files import FileEngine
from powertrain_checkpoint.means import PAGE

_SLAB = 16 * 2**20
"""Bytes of memory that are taken at a time."""


class Keeper:
    """Gives memory, piece by piece.

    Args:
        engine: makes it.
        room: bytes that may be taken in all.

    Attributes:
        seconds: that it took to find memory.
    """

    def __init__(self, engine: FileEngine, room: int) -> None:
        self._engine = engine
        self._room = room
        self._slab = memoryview(b"")
        self.seconds = 0.0

    def take(self, nbytes: int, speed: float) -> memoryview | None:
        """Return memory that starts at a page; None where there is no more, or it comes more slowly than a read.

        New memory may be slow: a virtual machine's host must find it first, or it is swapped.

        Args:
            nbytes: its size.
            speed: bytes that the disk reads in a second.
        """
        size = -(-nbytes // PAGE) * PAGE
        if size > len(self._slab):
            self._slab = memoryview(b"")
            self._slab = self._next(max(size, _SLAB), speed)
        if size > len(self._slab):
            return None
        found, self._slab = self._slab[:nbytes], self._slab[size:]
        return found

    def _next(self, nbytes: int, speed: float) -> memoryview:
        if nbytes > self._room:
            self._room = 0
            return memoryview(b"")
        self._room -= nbytes
        begin = time.monotonic()
        try:
            slab = self._engine.buffer(nbytes)
        except (MemoryError, OSError):
            self._room = 0
            return memoryview(b"")
        # Memory is found when it is touched; better here, where it can be timed, than while the kernel reads into it.
        torch.frombuffer(slab, dtype=torch.uint8)[::PAGE].fill_(0)
        taken = time.monotonic() - begin
        self.seconds += taken
        if taken * speed > nbytes:
            self._room = 0  # this one is here now; there will be no other
        return slab
