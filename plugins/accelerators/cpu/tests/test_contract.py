"""The contract of accelerators, on the processor."""

from __future__ import annotations

from powertrain.testing.accelerator import AcceleratorContract
from powertrain_cpu.accelerator import CpuAccelerator


class TestCpu(AcceleratorContract):
    """Every test of the contract, on ``CpuAccelerator``."""

    def make(self) -> CpuAccelerator:
        """Return the accelerator."""
        return CpuAccelerator()
