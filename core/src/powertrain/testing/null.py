"""Stand-ins that compute and send nothing: a layout of 1,024 ranks fits one process.

``NullPlugin`` answers for the accelerator and the communicator, so that an
engine of any rank of any world can be built and looked at::

    engine = powertrain.initialize(model, {"accelerator": {"use": "null"}}, plugins=[NullPlugin()])
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from powertrain.errors import AcceleratorError
from powertrain.hookspecs import hookimpl
from powertrain.mesh import Mesh
from powertrain.plugin import NoConfig, Plugin
from powertrain.roles.accelerator import Accelerator, Memory
from powertrain.roles.communicator import Collective, Communicator, Done, Handle


class NullAccelerator(Accelerator):
    """A device without memory: its tensors have shapes and types only (``meta``).

    Attributes:
        calls: the name of every method called, in order.
    """

    name: ClassVar[str] = "null"
    device_type: ClassVar[str] = "meta"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def device_count(self) -> int:
        """Return 1: every local rank shares the one device."""
        self.calls.append("device_count")
        return 1

    def device(self, index: int) -> torch.device:
        """Return the one device, whatever the local rank."""
        self.calls.append("device")
        if index < 0:
            raise AcceleratorError(f"there is no local rank {index}", expected="0 or more")
        return torch.device(self.device_type)

    def activate(self, device: torch.device) -> None:
        """Note the call."""
        self.calls.append("activate")

    def synchronize(self, device: torch.device) -> None:
        """Note the call."""
        self.calls.append("synchronize")

    def memory(self, device: torch.device) -> Memory:
        """Return zeros."""
        self.calls.append("memory")
        return Memory(used=0, peak=0, total=0, free=0)

    def reset_peak_memory(self, device: torch.device) -> None:
        """Note the call."""
        self.calls.append("reset_peak_memory")

    def dtypes(self) -> frozenset[torch.dtype]:
        """Return the usual floating-point types."""
        return frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

    def seed(self, value: int, device: torch.device) -> None:
        """Seed the host's generator."""
        self.calls.append("seed")
        torch.default_generator.manual_seed(value)

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """Return the state of the host's generator."""
        self.calls.append("rng_state")
        return torch.default_generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Continue the host's generator from ``state``."""
        self.calls.append("set_rng_state")
        torch.default_generator.set_state(state)


class NullHost(NullAccelerator):
    """The host's own memory, without an account of it: computes, for tests of other roles."""

    device_type: ClassVar[str] = "cpu"


class NullCommunicator(Communicator):
    """Notes each collective and leaves every tensor as it is.

    Attributes:
        issued: what was asked of it, in order.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.mesh = mesh
        self.device = device
        self.issued: list[Collective] = []

    def issue(self, collective: Collective) -> Handle:
        """Note the collective."""
        self.issued.append(collective)
        return Done()

    def gather_json(self, value: Any, dimension: str = "world", *, label: str = "") -> list[Any]:
        """Return this rank's value in place of every rank's."""
        return [value] * self.size(dimension)

    def close(self) -> None:
        """Do nothing."""


class NullPlugin(Plugin[NoConfig]):
    """Offers the accelerator ``null`` and a communicator that sends nothing."""

    name, api, support = "null", 1, "first-party"

    def __init__(self, config: NoConfig | None = None) -> None:
        super().__init__(config or NoConfig())

    @hookimpl
    def make_accelerator(self, name: str) -> Accelerator | None:
        """Return the accelerator ``null``."""
        return NullAccelerator() if name == self.name else None

    @hookimpl
    def make_communicator(self, accelerator: Accelerator, mesh: Mesh) -> Communicator:
        """Return a communicator that sends nothing, for a world of any size."""
        return NullCommunicator(mesh, accelerator.device(0))
