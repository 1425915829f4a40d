"""Host memory for transfers: borrowed, filled, written out, and used again."""

from __future__ import annotations

import threading
from collections import deque

import attrs
import torch

from powertrain.roles.files import FileEngine, Transfer

_ROUND = 64 * 1024
"""Bytes: buffers are multiples of it, so that pieces of about one size can use one another's."""


@attrs.frozen(eq=False)
class Buffer:
    """Memory for transfers.

    Attributes:
        view: for the engine.
        tensor: the same memory (uint8).
    """

    view: memoryview
    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Its size."""
        return len(self.view)


class Pool:
    """Lends buffers; those being written out come back by themselves. Several threads may use it.

    Args:
        engine: makes aligned memory.
        limit: bytes that are kept; more than this is never free, and no more is made while writes under way
            will give some back.
    """

    def __init__(self, engine: FileEngine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._free: list[Buffer] = []
        self._leaving: deque[tuple[Transfer, Buffer]] = deque()
        self._total = 0
        self._lock = threading.RLock()

    def borrow(self, nbytes: int) -> Buffer:
        """Return a buffer of at least ``nbytes`` with arbitrary content.

        Raises:
            TransferFailed: a write under way has failed.
        """
        size = max(-(-nbytes // _ROUND) * _ROUND, _ROUND)
        with self._lock:
            self._reap()
            found = self._take(size)
            while found is None and self._total + size > self._limit and self._leaving:
                self._finish_one()
                found = self._take(size)
            return found or self._make(size)

    def give_back(self, buffer: Buffer) -> None:
        """Take a buffer back."""
        with self._lock:
            self._free.append(buffer)
            while self._total > self._limit and self._free:
                self._total -= self._free.pop(0).nbytes

    def leaves(self, transfer: Transfer, buffer: Buffer) -> None:
        """Take a buffer back when it is written out."""
        with self._lock:
            self._leaving.append((transfer, buffer))

    def settle(self) -> None:
        """Wait for all writes.

        Raises:
            TransferFailed: one has failed.
        """
        with self._lock:
            while self._leaving:
                self._finish_one()

    def drop(self) -> None:
        """Let go of all buffers; those on loan go with their last use."""
        with self._lock:
            self._free.clear()

    def _take(self, size: int) -> Buffer | None:
        """Return the smallest free buffer that is large enough, unless it is far too large."""
        fitting = [buffer for buffer in self._free if size <= buffer.nbytes <= 2 * size]
        if not fitting:
            return None
        found = min(fitting, key=lambda buffer: buffer.nbytes)
        self._free.remove(found)
        return found

    def _make(self, size: int) -> Buffer:
        while self._free and self._total + size > self._limit:
            self._total -= self._free.pop(0).nbytes
        view = self._engine.buffer(size)
        self._total += size
        return Buffer(view, torch.frombuffer(view, dtype=torch.uint8))

    def _reap(self) -> None:
        while self._leaving and self._leaving[0][0].done():
            self._finish_one()

    def _finish_one(self) -> None:
        transfer, buffer = self._leaving.popleft()
        self.give_back(buffer)
        transfer.wait()
