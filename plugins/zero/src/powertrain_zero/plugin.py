"""The plugin ``zero``: shards optimizer state, gradients and parameters over the data dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

from powertrain.hookspecs import hookimpl
from powertrain.plugin import Plugin
from powertrain_zero.config import ZeroConfig

if TYPE_CHECKING:
    import click
    import torch

    from powertrain.context import Context
    from powertrain.roles.optimizer import OptimizerWrapper


class ZeroPlugin(Plugin[ZeroConfig]):
    """Shards optimizer state, gradients and parameters over the data dimension."""

    name, api, support = "zero", 1, "first-party"

    @hookimpl
    def wrap_optimizer(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, context: Context
    ) -> OptimizerWrapper:
        """Return the sharded optimizer of this run."""
        from powertrain_zero.sharded import ShardedOptimizer

        return ShardedOptimizer(model, optimizer, self.config, context)

    @classmethod
    def check_ranks(cls, table: ZeroConfig, ranks: int) -> None:
        """Refuse group sizes that do not divide the ranks."""
        table.check_ranks(ranks)

    @staticmethod
    @hookimpl
    def add_commands(cli: click.Group) -> None:
        """Add ``powertrain plan``: it is here because only this plugin knows how memory is laid out.

        It needs no object: without a configuration, none can be made.
        """
        from powertrain_zero.plan.command import plan

        cli.add_command(plan)
