"""One allocation for what stays, so that what comes and goes leaves no holes between it.

While a model is born, each whole tensor lives shortly. Were this rank's slices
allocated in between, the allocator would put them into the holes that whole
tensors leave, and the next whole tensor would need fresh memory: a rank would end up
with the memory of the whole model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch


class Arena:
    """Flat memory of several types, handed out piece by piece.

    Args:
        allocate: returns a flat buffer of so many elements of a type.
    """

    def __init__(self, allocate: Callable[[int, torch.dtype], torch.Tensor]) -> None:
        self._allocate = allocate
        self._wanted: dict[torch.dtype, int] = defaultdict(int)
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        self._taken: dict[torch.dtype, int] = defaultdict(int)

    def want(self, numel: int, dtype: torch.dtype) -> None:
        """Announce a piece; all must be announced before ``allocate``."""
        self._wanted[dtype] += numel

    def allocate(self) -> None:
        """Allocate what was announced: before anything short-lived, whose touched pages it would lie on for good."""
        self._buffers = {dtype: self._allocate(numel, dtype) for dtype, numel in self._wanted.items()}

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a piece that was announced."""
        start = self._taken[dtype]
        self._taken[dtype] += numel
        assert self._taken[dtype] <= self._wanted[dtype], "more was taken than announced"
        return self._buffers[dtype][start : start + numel]
