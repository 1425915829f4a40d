"""AMD GPUs through ``torch.cuda``, which in a ROCm build of torch calls HIP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from powertrain.roles.torch_device import TorchDeviceAccelerator
from powertrain.torch_build import torch_build
from powertrain_triton.offer import Offer

DRIVER = Path("/sys/module/amdgpu/version")
"""Where the kernel module says its version (Linux; absent for the one built into the kernel)."""


class RocmAccelerator(TorchDeviceAccelerator):
    """AMD GPUs, one a rank."""

    name: ClassVar[str] = "rocm"
    device_type: ClassVar[str] = "cuda"
    build: ClassVar[str | None] = "hip"

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
        """Return RCCL, which torch calls ``nccl``, then gloo, which goes through host memory."""
        return ("nccl", "gloo")

    def describe(self) -> dict[str, str]:
        """Return the GPU's name, memory and architecture, and the versions of HIP and the driver."""
        facts = super().describe()
        if "name" in facts:
            properties = self.module.get_device_properties(torch.device(self.device_type, 0))
            facts["architecture"] = properties.gcnArchName
        facts["hip"] = torch_build("hip") or "none"
        facts["driver"] = driver_version()
        return facts


def driver_version(file: Path = DRIVER) -> str:
    """Return the version of the loaded AMD driver, or "unknown"."""
    try:
        return file.read_text().strip()
    except OSError:
        return "unknown"
