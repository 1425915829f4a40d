"""NVIDIA GPUs through ``torch.cuda``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from powertrain.roles.torch_device import TorchDeviceAccelerator
from powertrain.torch_build import torch_build
from powertrain_triton.offer import Offer

DRIVER = Path("/proc/driver/nvidia/version")
"""Where the kernel module says its version (Linux)."""


class CudaAccelerator(TorchDeviceAccelerator):
    """NVIDIA GPUs, one a rank."""

    name: ClassVar[str] = "cuda"
    device_type: ClassVar[str] = "cuda"
    build: ClassVar[str | None] = "cuda"

    def has_bf16(self) -> bool:
        """Return whether the GPU has bfloat16 units (Ampere and later), not whether it can emulate them."""
        return bool(self.module.is_bf16_supported(including_emulation=False))

    def __init__(self, module: Any = None) -> None:
        super().__init__(module)
        self._kernels = Offer()

    @property
    def capabilities(self) -> frozenset[str]:
        """Return ``streams``, ``pinned``, ``graphs`` and ``kernels``."""
        return super().capabilities | {"graphs", "kernels"}

    def kernel(self, name: str) -> Callable[..., Any] | None:
        """Return the Triton kernel called ``name``; None where triton cannot run, which is said once."""
        return self._kernels.get(name)

    def backends(self) -> tuple[str, ...]:
        """Return NCCL, then gloo, which goes through host memory."""
        return ("nccl", "gloo")

    def describe(self) -> dict[str, str]:
        """Return the GPU's name, memory and compute capability, and the versions of CUDA and the driver."""
        facts = super().describe()
        if "name" in facts:
            properties = self.module.get_device_properties(torch.device(self.device_type, 0))
            facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["cuda"] = torch_build("cuda") or "none"
        facts["driver"] = driver_version()
        return facts


def driver_version(file: Path = DRIVER) -> str:
    """Return the version of the loaded NVIDIA driver, or "unknown".

    The file's first line reads ``NVRM version: NVIDIA UNIX x86_64 Kernel
    Module  550.54.15  <date>``, with more words in front of the version for
    the open kernel module.
    """
    try:
        words = file.read_text().partition("\n")[0].split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")
