"""What a store moves bytes with: a file engine, memory for transfers, and threads that copy and check."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from powertrain.roles.files import FileEngine
from powertrain_checkpoint.memory import bytes_of
from powertrain_checkpoint.plain import PlainEngine

if TYPE_CHECKING:
    from powertrain.roles.accelerator import Accelerator

PAGE = 4096
"""Bytes: memory and files are alike modulo this, so that an engine need not copy to go past the page cache."""

RING = 64 * 2**20
"""Bytes of memory that a synchronous save passes through."""


class Means:
    """One store's. Nothing is made before it is needed.

    Args:
        make_engine: asks for the file engine; None where there is none.
        accelerator: makes memory page-locked, where it can.
        threads: that copy and check at a time.
        ranks: of this host, which share its memory.
    """

    def __init__(
        self,
        make_engine: Callable[[], FileEngine | None] | None = None,
        accelerator: Accelerator | None = None,
        threads: int = 2,
        ranks: int = 1,
    ) -> None:
        self._make = make_engine
        self._engine: FileEngine | None = None
        self._ring: memoryview | None = None
        self.pins = accelerator if accelerator and "pinned" in accelerator.capabilities else None
        self.accelerator = accelerator
        self.threads = threads
        self.ranks = ranks

    @property
    def ready(self) -> bool:
        """Whether the engine is there."""
        return self._engine is not None

    @property
    def engine(self) -> FileEngine:
        """The file engine; the plugins are asked at the first use.

        Raises:
            EngineUnavailable: the one that is asked for does not work here.
        """
        if self._engine is None:
            self._engine = (self._make() if self._make is not None else None) or PlainEngine()
        return self._engine

    def crew(self) -> ThreadPoolExecutor:
        """Return threads for one piece of work, to be used in a ``with`` block."""
        return ThreadPoolExecutor(self.threads, "checkpoint")

    def ring(self) -> memoryview:
        """Return the memory that a synchronous save passes through, the same at each call."""
        if self._ring is None:
            self._ring = self.memory(RING)
        return self._ring

    def memory(self, nbytes: int) -> memoryview:
        """Return new memory that starts at a page, page-locked where devices copy faster to such."""
        if self.pins is None:
            return self.engine.buffer(nbytes)
        return bytes_of(self.pins.pin(torch.empty(nbytes, dtype=torch.uint8)))

    def synchronize(self, tensors: list[torch.Tensor]) -> None:
        """Wait for what devices have still to do to tensors on them."""
        if self.accelerator is not None:
            for device in {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}:
                self.accelerator.synchronize(device)

    def close(self) -> None:
        """Give the engine and the memory up; a later use makes them anew."""
        engine, self._engine, self._ring = self._engine, None, None
        if engine is not None:
            engine.close()
