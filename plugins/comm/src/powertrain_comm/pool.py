"""Receive buffers that are used again.

A large fresh allocation costs a page fault for every 4 KiB when it is first
written, which takes longer than receiving into it.
"""

from __future__ import annotations

import torch

SMALLEST = 1 << 12
"""Bytes of the smallest buffer; the others are powers of two, whose unused end is never touched."""

KEPT = 4
"""Buffers of one size that are kept while nobody uses them."""


class BufferPool:
    """Lends flat host memory; what is not given back is simply freed."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}

    def take(self, nbytes: int) -> torch.Tensor:
        """Return at least ``nbytes`` uninitialized elements of type uint8."""
        size = max(SMALLEST, 1 << (nbytes - 1).bit_length())
        try:
            return self._free[size].pop()
        except (KeyError, IndexError):
            return torch.empty(size, dtype=torch.uint8)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back that nothing writes to any more."""
        free = self._free.setdefault(buffer.numel(), [])
        if len(free) < KEPT:
            free.append(buffer)

    def clear(self) -> None:
        """Free the buffers that nobody uses."""
        self._free.clear()
