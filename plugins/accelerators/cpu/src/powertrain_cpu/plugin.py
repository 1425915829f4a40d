"""The plugin ``cpu``: offers the processor to the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from powertrain.hookspecs import hookimpl
from powertrain.plugin import NoConfig, Plugin, Probe

if TYPE_CHECKING:
    from powertrain.native import KernelSet
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

    @classmethod
    def kernel_sets(cls) -> tuple[KernelSet, ...]:
        """Return the kernels of the processor."""
        from powertrain.native import KernelSet

        return (KernelSet("cpu", "powertrain_cpu.source:SOURCE", "powertrain_cpu.selftest:check"),)

    @hookimpl
    def make_accelerator(self, name: str) -> Accelerator | None:
        """Return the accelerator ``cpu``."""
        if name != self.name:
            return None
        from powertrain_cpu.accelerator import CpuAccelerator

        return CpuAccelerator()
