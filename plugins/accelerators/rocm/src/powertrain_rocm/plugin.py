"""The plugin ``rocm``: offers AMD GPUs to the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from powertrain.hookspecs import hookimpl
from powertrain.plugin import NoConfig, Plugin, Probe
from powertrain.torch_build import torch_build

if TYPE_CHECKING:
    from powertrain.roles.accelerator import Accelerator


class RocmPlugin(Plugin[NoConfig]):
    """Computes on AMD GPUs."""

    name, api, support = "rocm", 1, "first-party"

    def is_available(self) -> Probe:
        """Say whether torch was built for ROCm and sees a device, creating no context."""
        if torch_build("hip") is None:
            return Probe(False, "this build of torch has no ROCm")
        from powertrain_rocm.accelerator import RocmAccelerator

        return RocmAccelerator().probe()

    @hookimpl
    def make_accelerator(self, name: str) -> Accelerator | None:
        """Return the accelerator ``rocm``; its ``device`` says what is missing where there is none."""
        if name != self.name:
            return None
        from powertrain_rocm.accelerator import RocmAccelerator

        return RocmAccelerator()
