"""The plugin `toy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from powertrain import Plugin, Probe, hookimpl
from powertrain.plugin import NoConfig

if TYPE_CHECKING:
    from powertrain.roles.accelerator import Accelerator


class ToyPlugin(Plugin[NoConfig]):
    """Offers the accelerator `toy`."""

    name, api = "toy", 1

    def is_available(self) -> Probe:
        """Say that a toy is always at hand."""
        return Probe(True, "a toy")

    @hookimpl
    def make_accelerator(self, name: str) -> Accelerator | None:
        """Return the accelerator `toy`."""
        if name != self.name:
            return None
        from powertrain_toy.accelerator import ToyAccelerator

        return ToyAccelerator()
