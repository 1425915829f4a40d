"""The entry point: makes the tiers of ``[offload]`` and the I/O engine, and adds ``powertrain io``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from powertrain.errors import ShardingError
from powertrain.hookspecs import hookimpl
from powertrain.plugin import Phase, Plugin, Rest
from powertrain_offload.config import CATEGORIES, OffloadConfig

if TYPE_CHECKING:
    import click
    import torch

    from powertrain.context import Context
    from powertrain.engine import Engine
    from powertrain.native import KernelSet
    from powertrain.roles.files import FileEngine
    from powertrain.roles.tier import Category, Tier
    from powertrain_offload.activations import OffloadedActivations
    from powertrain_offload.tiers import Tiers


class OffloadPlugin(Plugin[OffloadConfig]):
    """Keeps training state in host memory and on disks, and moves it past the page cache."""

    name, api, support = "offload", 1, "first-party"
    phase = Phase.RECOMPUTE

    def __init__(self, config: OffloadConfig) -> None:
        super().__init__(config)
        self._tiers: Tiers | None = None
        self._asked: set[Category] = set()
        self._activations: OffloadedActivations | None = None

    @hookimpl
    def on_prepare(self, model: torch.nn.Module, context: Context) -> None:
        """Refuse what this machine cannot carry, before anything is allocated."""
        if self.config.places != {"device"}:
            self._all(context).check(model)

    @hookimpl
    def on_engine_ready(self, engine: Engine) -> None:
        """Refuse a table that nobody asks about: its state would rest on the device in silence.

        Raises:
            ShardingError: nothing of the run can let it rest elsewhere.
        """
        unheard = [name for name in CATEGORIES if getattr(self.config, name) != "device" and name not in self._asked]
        if unheard:
            raise ShardingError(
                f"nothing in this run lets its {' and '.join(unheard)} rest elsewhere than on the device",
                where=f"offload.{unheard[0]}",
                expected="a plugin that keeps its state in tiers, as zero does",
                remedy="add the section [zero] with stage = 1, 2 or 3, or leave the key out",
            )

    @hookimpl
    def make_tier(self, category: Category, context: Context) -> Tier | None:
        """Return where a category rests; None for the device."""
        self._asked.add(category)
        if getattr(self.config, category) == "device":
            return None
        return self._all(context).of(category)

    @hookimpl
    def make_file_engine(self, context: Context | None) -> FileEngine | None:
        """Return the engine that the table asks for."""
        from powertrain_offload import io

        table = self.config
        return io.open_engine(table.engine, block=table.block, depth=table.depth, threads=table.threads)

    @hookimpl
    def transform_model(self, model: torch.nn.Module, context: Context) -> torch.nn.Module | None:
        """Let what backward needs rest where the table says."""
        if self.config.activations == "device":
            return None
        from powertrain_offload.activations import offload_activations

        self._activations = offload_activations(model, context.tier("activations"))
        return None

    @hookimpl
    def on_close(self, engine: Engine) -> None:
        """Let the model keep what backward needs itself again."""
        if self._activations is not None:
            self._activations.close()
            self._activations = None

    def _all(self, context: Context) -> Tiers:
        if self._tiers is None:
            from powertrain_offload.tiers import Tiers

            self._tiers = Tiers(self.config, context)
        return self._tiers

    @staticmethod
    @hookimpl
    def add_commands(cli: click.Group) -> None:
        """Add ``powertrain io``: it measures disks, and needs no configuration."""
        from powertrain_offload.io.command import io

        cli.add_command(io)

    @classmethod
    def rests(cls, table: OffloadConfig) -> Mapping[str, Rest]:
        """Return what rests elsewhere under a table."""
        return {
            name: Rest(
                place="disk" if getattr(table, name) == "nvme" else "host",
                share=table.ratio if name == "optimizer" else 1.0,
                grain=table.grain,
                buffers=table.buffers,
            )
            for name in CATEGORIES
            if getattr(table, name) != "device"
        }

    @classmethod
    def kernel_sets(cls) -> tuple[KernelSet, ...]:
        """Return the C++ of the I/O engine."""
        from powertrain.native import KernelSet

        return (KernelSet("io", "powertrain_offload.io.source:SOURCE", "powertrain_offload.io.selftest:check"),)
