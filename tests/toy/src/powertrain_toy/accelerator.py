"""A toy device in the host's memory, with an account of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import torch

from powertrain.errors import AcceleratorError
from powertrain.roles.accelerator import Accelerator, Memory


class ToyAccelerator(Accelerator):
    """One device that every rank shares; it counts how often it was waited for.

    Attributes:
        waits: the calls of ``synchronize``.
    """

    name: ClassVar[str] = "toy"
    device_type: ClassVar[str] = "cpu"

    def __init__(self) -> None:
        self.waits = 0
        self._largest = 0

    def device_count(self) -> int:
        """Return 1."""
        return 1

    def device(self, index: int) -> torch.device:
        """Return the device, whatever the local rank."""
        if index < 0:
            raise AcceleratorError(f"there is no local rank {index}", expected="0 or more")
        return torch.device(self.device_type)

    def activate(self, device: torch.device) -> None:
        """Do nothing: there is one device."""

    def synchronize(self, device: torch.device) -> None:
        """Count the call; work is done when a call returns."""
        self.waits += 1

    def memory(self, device: torch.device) -> Memory:
        """Return the process's resident memory; the peak is the largest value read since the reset."""
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page
        used = int(Path("/proc/self/statm").read_text().split()[1]) * page
        self._largest = max(self._largest, used)
        return Memory(used=used, peak=self._largest, total=total, free=max(0, total - used))

    def reset_peak_memory(self, device: torch.device) -> None:
        """Start the peak anew."""
        self._largest = 0

    def dtypes(self) -> frozenset[torch.dtype]:
        """Return the types it trains in."""
        return frozenset({torch.float32, torch.bfloat16})

    def seed(self, value: int, device: torch.device) -> None:
        """Seed the generator."""
        torch.default_generator.manual_seed(value)

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """Return the generator's state."""
        return torch.default_generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Continue from a state."""
        torch.default_generator.set_state(state)

    def describe(self) -> dict[str, str]:
        """Return its name."""
        return {"name": "Toy 1"}
