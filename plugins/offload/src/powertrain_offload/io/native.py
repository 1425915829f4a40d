"""The engines in C++."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

from powertrain_offload.io.engine import Engine
from powertrain_offload.io.moving import Moving
from powertrain_offload.io.part import Alignment, Part
from powertrain_offload.io.settings import Settings


class NativeEngine(Engine):
    """Moves blocks by io_uring ("uring"), or by threads ("direct").

    Args:
        module: built from ``source.SOURCE``.
        kind: which of them.
        settings: blocks, and how many at once.

    Raises:
        RuntimeError: the kernel refuses; says why.
    """

    def __init__(self, module: ModuleType, kind: Literal["uring", "direct"], settings: Settings) -> None:
        super().__init__(settings)
        self.name = kind
        self._module = module
        if kind == "uring":
            self._native: Any = module.ring(depth=settings.depth, block=settings.block)
        else:
            self._native = module.pool(threads=settings.threads, block=settings.block)
        # At the end of the process too: what has not begun is dropped, for threads must not outlive it.
        self._end = weakref.finalize(self, self._native.stop)

    def _alignment(self) -> Alignment:
        alignment: Alignment = self._module.direct_alignment
        return alignment

    def attach(self, parts: Sequence[Part], stripe: int) -> Any:
        """Return the file as the module knows it."""
        known = [(part.direct, part.buffered, part.edge, part.memory) for part in parts]
        return self._module.File(parts=known, stripe=stripe)

    def start(self, attached: Any, writes: bool, offset: int, view: memoryview) -> Moving:
        """Start to move the bytes of ``view``."""
        moving: Moving = self._native.start(attached, writes, offset, view)
        return moving

    def _stop(self) -> None:
        self._end()
