"""Receive buffers that are used again.

A large fresh allocation costs a page fault for every 4 KiB when it is first
written, which takes longer than receiving into it. What is kept idle is
memory that the model cannot have, so it is little.
"""

from __future__ import annotations

import torch

GRAIN = 1 << 12
"""Bytes: sizes are rounded up to a multiple of this, a page."""

KEPT = 16 * 2**20
"""Bytes of all buffers together that are kept while nobody uses them."""


class BufferPool:
    """Lends flat host memory; what is not kept is simply freed."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []  # the longest unused first

    def take(self, nbytes: int) -> torch.Tensor:
        """Return at least ``nbytes`` uninitialized elements of type uint8, at most twice as many."""
        size = -(-max(nbytes, 1) // GRAIN) * GRAIN
        fitting = [place for place, buffer in enumerate(self._free) if size <= buffer.numel() <= 2 * size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda place: self._free[place].numel()))
        return torch.empty(size, dtype=torch.uint8)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back that nothing writes to any more; the longest unused ones make room for it."""
        if buffer.numel() > KEPT:
            return
        self._free.append(buffer)
        while sum(kept.numel() for kept in self._free) > KEPT:
            self._free.pop(0)

    def clear(self) -> None:
        """Free the buffers that nobody uses."""
        self._free.clear()
