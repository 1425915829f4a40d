"""Running statistics, which a batch enters once although its block runs twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch


@attrs.frozen
class Statistics:
    """The modules of a block that keep running statistics of what goes through them.

    Attributes:
        modules: batch norms and their like.
    """

    modules: tuple[Any, ...]

    @classmethod
    def of(cls, block: torch.nn.Module) -> Statistics:
        """Return those of a block."""
        return cls(tuple(module for module in block.modules() if getattr(module, "track_running_stats", False)))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Let the modules normalize as ever, and leave their statistics alone."""
        before = [(module, module.momentum, module.num_batches_tracked) for module in self.modules]
        for module in self.modules:
            # They stay tracked: without, other tensors would be saved for backward than in the first run.
            module.momentum, module.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for module, momentum, count in before:
                module.momentum, module.num_batches_tracked = momentum, count
