"""The plugin ``optimizers``: makes the optimizer that ``[optimizer] name`` names, if it is one of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from powertrain.hookspecs import hookimpl
from powertrain.plugin import NoConfig, Plugin
from powertrain_optimizers.options import OPTIONS

if TYPE_CHECKING:
    from powertrain.roles.optimizer import OptimizerFactory


class OptimizersPlugin(Plugin[NoConfig]):
    """Makes optimizers that scale, update and cast in one pass over memory."""

    name, api, support = "optimizers", 1, "first-party"
    options = {"optimizer": OPTIONS}

    @hookimpl
    def make_optimizer(self, name: str, options: dict[str, Any]) -> OptimizerFactory | None:
        """Return what makes the optimizer called ``name``; None for names of others."""
        from powertrain_optimizers.factory import factory

        return factory(name, options)
