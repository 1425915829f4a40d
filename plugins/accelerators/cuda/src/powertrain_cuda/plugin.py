"""The plugin ``cuda``: offers NVIDIA GPUs to the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from powertrain.hookspecs import hookimpl
from powertrain.plugin import NoConfig, Plugin, Probe
from powertrain.torch_build import torch_build

if TYPE_CHECKING:
    from powertrain.roles.accelerator import Accelerator


class CudaPlugin(Plugin[NoConfig]):
    """Computes on NVIDIA GPUs."""

    name, api, support = "cuda", 1, "first-party"

    def is_available(self) -> Probe:
        """Say whether torch was built for CUDA and sees a device, creating no context."""
        if torch_build("cuda") is None:
            return Probe(False, "this build of torch has no CUDA")
        from powertrain_cuda.accelerator import CudaAccelerator

        return CudaAccelerator().probe()

    @hookimpl
    def make_accelerator(self, name: str) -> Accelerator | None:
        """Return the accelerator ``cuda``; its ``device`` says what is missing where there is none."""
        if name != self.name:
            return None
        from powertrain_cuda.accelerator import CudaAccelerator

        return CudaAccelerator()
