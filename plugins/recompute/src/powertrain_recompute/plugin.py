"""The plugin ``recompute``: what is computed again in backward, in place of being kept; imports torch only in hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from powertrain.hookspecs import hookimpl
from powertrain.plugin import Phase, Plugin
from powertrain_recompute.config import RecomputeConfig

if TYPE_CHECKING:
    import torch

    from powertrain.context import Context


class RecomputePlugin(Plugin[RecomputeConfig]):
    """Runs the blocks of a model again in backward, in place of keeping what they computed."""

    name, api, support = "recompute", 1, "first-party"
    phase: ClassVar[Phase | None] = Phase.RECOMPUTE

    def __init__(self, config: RecomputeConfig) -> None:
        super().__init__(config)
        self._undo: list[Callable[[], None]] = []

    @hookimpl
    def transform_model(self, model: torch.nn.Module, context: Context) -> None:
        """Let the blocks run as the policy says; the model itself stays what it is."""
        from powertrain_recompute.transform import recompute

        self._undo = recompute(model, self.config, context.device)

    @hookimpl
    def on_close(self) -> None:
        """Leave the model as it was."""
        while self._undo:
            self._undo.pop()()
