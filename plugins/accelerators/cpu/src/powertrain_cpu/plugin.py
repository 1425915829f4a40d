"""The plugin ``cpu``: offers the processor to the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from powertrain.hookspecs import hookimpl
from powertrain.plugin import NoConfig, Plugin, Probe

if TYPE_CHECKING:
    from powertrain.roles.accelerator import Accelerator


class CpuPlugin(Plugin[NoConfig]):
    """Computes on the processor; chosen by itself only where there is nothing faster."""

    name, api, support = "cpu", 1, "first-party"
    fallback = True

    def is_available(self) -> Probe:
        """Say how many cores this process may use."""
        from powertrain_cpu.host import usable_cores

        cores = usable_cores()
        return Probe(True, f"{cores} core{'s' if cores > 1 else ''}")

    @hookimpl
    def make_accelerator(self, name: str) -> Accelerator | None:
        """Return the accelerator ``cpu``."""
        if name != self.name:
            return None
        from powertrain_cpu.accelerator import CpuAccelerator

        return CpuAccelerator()
