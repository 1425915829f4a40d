"""The processor as an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from powertrain import native
from powertrain.errors import AcceleratorError
from powertrain.roles.accelerator import Accelerator, Memory
from powertrain_cpu import heap, host
from powertrain_cpu.kernels import CpuKernels
from powertrain_cpu.memory import ProcessMemory, host_memory
from powertrain_cpu.source import SOURCE


class CpuAccelerator(Accelerator):
    """One processor, shared by all ranks of a host; its memory is the host's.

    Work is done when a call returns, so there is nothing to wait for.
    """

    name: ClassVar[str] = "cpu"
    device_type: ClassVar[str] = "cpu"

    def __init__(self) -> None:
        self._process = ProcessMemory()
        self._kernels: CpuKernels | None = None
        self._asked = False

    @property
    def capabilities(self) -> frozenset[str]:
        """Return ``kernels``: they are built when the first one is asked for."""
        return frozenset({"kernels"})

    def kernel(self, name: str) -> Callable[..., Any] | None:
        """Return the C++ kernel called ``name``; None where nothing can build it, which is said once."""
        if not self._asked:
            self._asked = True
            module = native.try_load(SOURCE, "the PyTorch reference")
            self._kernels = None if module is None else CpuKernels(module)
        return None if self._kernels is None else self._kernels.get(name)

    def device_count(self) -> int:
        """Return 1: every local rank shares the one device."""
        return 1

    def device(self, index: int) -> torch.device:
        """Return the device, whatever the local rank."""
        if index < 0:
            raise AcceleratorError(f"there is no local rank {index}", expected="0 or more")
        return torch.device("cpu")

    def activate(self, device: torch.device) -> None:
        """Let freed memory stay with this process: the next step asks for as much."""
        heap.keep_freed()

    def synchronize(self, device: torch.device) -> None:
        """Do nothing: no work is queued."""

    def memory(self, device: torch.device) -> Memory:
        """Return this process's resident memory, and the host's as far as its container may use it."""
        total, free = host_memory()
        used, peak = self._process.read()
        return Memory(used=used, peak=peak, total=total, free=free)

    def reset_peak_memory(self, device: torch.device) -> None:
        """Start the peak of the resident memory anew."""
        self._process.reset_peak()

    def release_unused(self, device: torch.device) -> None:
        """Give free memory in the C library's heap back to the system, where the library can (glibc)."""
        heap.give_back()

    def dtypes(self) -> frozenset[torch.dtype]:
        """Return fp32, bf16, fp16 and fp64; torch emulates what the processor lacks."""
        return frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

    def seed(self, value: int, device: torch.device) -> None:
        """Seed torch's generator of the processor, and no other device's."""
        torch.default_generator.manual_seed(value)

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """Return the state of torch's generator of the processor (uint8)."""
        return torch.default_generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Continue torch's generator of the processor from ``state``."""
        torch.default_generator.set_state(state)

    def describe(self) -> dict[str, str]:
        """Return the model, the usable cores, torch's threads and the vector instructions."""
        return {
            "name": host.model_name(),
            "cores": str(host.usable_cores()),
            "threads": str(torch.get_num_threads()),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "instructions": " ".join(host.instruction_sets()) or "unknown",
        }
