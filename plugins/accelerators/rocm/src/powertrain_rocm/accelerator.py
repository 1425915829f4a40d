"""AMD GPUs through ``torch.cuda``, which in a ROCm build of torch calls HIP."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from powertrain.roles.torch_device import TorchDeviceAccelerator
from powertrain.torch_build import torch_build

DRIVER = Path("/sys/module/amdgpu/version")
"""Where the kernel module says its version (Linux; absent for the one built into the kernel)."""


class RocmAccelerator(TorchDeviceAccelerator):
    """AMD GPUs, one a rank."""

    name: ClassVar[str] = "rocm"
    device_type: ClassVar[str] = "cuda"
    build: ClassVar[str | None] = "hip"

    @property
    def capabilities(self) -> frozenset[str]:
        """Return ``streams``, ``pinned`` and ``graphs``."""
        return super().capabilities | {"graphs"}

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
