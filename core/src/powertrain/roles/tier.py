"""The tier role: where pieces of training state rest, and how they come to where they are used.

Whoever keeps state (a sharded optimizer, saved activations) reserves a ``Slot`` for each piece and never
learns where it lies. Content is used under a ``Lease``: fetched, changed, stored, while other leases are
under way. On the device itself a lease is a view of what rests there, and costs nothing::

    lease = slot.fetch()                        # starts to bring it here
    lease.wait().view(torch.float32).add_(1)    # it is here
    lease.store()                               # starts to bring it back

Slots are bytes: who reserves one knows what types lie in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import attrs
import torch

from powertrain.roles.communicator import Done, Handle

Category = Literal["optimizer", "gradients", "parameters", "activations"]
"""What rests: masters and optimizer state; mean gradients; parameters between uses; what backward needs of forward."""


@attrs.frozen
class Moved:
    """Bytes that have moved: ``fetched`` to where content is used, and ``stored`` to where it rests."""

    fetched: int
    stored: int


class Lease(ABC):
    """The content of a slot, or of a part of it, in memory on loan; it ends with ``store`` or ``release``.

    Attributes:
        tensor: its bytes (uint8, flat), defined once ``wait`` has returned; aligned to 64 where the range starts at
            a multiple of 64.
    """

    tensor: torch.Tensor

    @abstractmethod
    def wait(self) -> torch.Tensor:
        """Return ``tensor`` when the content is there.

        Raises:
            StorageError: it could not be brought.
        """

    @abstractmethod
    def store(self) -> Handle:
        """Start to bring what ``tensor`` holds to where it rests; the tensor is not to be touched any more.

        A later ``fetch`` of the same bytes waits for it by itself. A failure is raised by the handle, or
        by a later call of the tier.
        """

    @abstractmethod
    def release(self) -> None:
        """End the loan without storing; the slot keeps what it had, unless it rests in this very memory."""


class Slot(ABC):
    """A piece of state at rest. What it holds is undefined until something is stored.

    Attributes:
        nbytes: its size.
        device: where its content is used, unless a lease says otherwise.
        resident: its bytes where they always lie in the memory of ``device``; None where they must be fetched.
    """

    nbytes: int
    device: torch.device
    resident: torch.Tensor | None = None

    @abstractmethod
    def fetch(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        """Start to bring bytes ``start`` to ``stop`` to ``device``. Leases under way may not overlap if one stores."""

    @abstractmethod
    def blank(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        """Lend memory for bytes ``start`` to ``stop`` with arbitrary content, all of which will be written."""

    @abstractmethod
    def free(self) -> None:
        """Give the slot up; what it holds is lost."""


class Tier(ABC):
    """One place where state rests.

    Attributes:
        name: "device", "host", "nvme", or what a plugin calls it.
        device: where content is used: the update of what rests here runs on this device.
        resident: whether content always lies in the memory of ``device``.
        stays: whether that is the device that computes, so that nothing ever moves.
        grain: bytes that are best moved at a time: enough to keep what moves them busy, few beside what rests.
        late: the share of state whose update may go on during the next forward pass, which uses the one before.
    """

    name: str
    device: torch.device
    resident: bool = False
    stays: bool = False
    grain: int = 32 * 2**20
    late: float = 0.0

    @abstractmethod
    def reserve(self, label: str, nbytes: int) -> Slot:
        """Return a new slot.

        Args:
            label: what it is for, for people: a unit's name and what of it.
            nbytes: its size.

        Raises:
            StorageError: there is no room.
        """

    def expect(self, nbytes: int) -> None:
        """Take note that about so much will be reserved in all, before any of it is.

        Raises:
            StorageError: there is no room for it.
        """

    def place(self, nbytes: int) -> Tier:
        """Return the tier in which the next piece of state of this size rests: itself, unless it stands for several."""
        return self

    def adopt(self, label: str, tensor: torch.Tensor) -> Slot:
        """Return a new slot that holds what ``tensor`` (uint8, flat) does; it may keep the tensor itself."""
        slot = self.reserve(label, tensor.numel())
        lease = slot.blank(device=tensor.device)
        lease.wait().copy_(tensor)
        lease.store()
        return slot

    def moved(self) -> Moved:
        """Return the bytes that were brought and taken away so far, of all that share its place."""
        return Moved(0, 0)

    def settle(self) -> None:
        """Wait until everything that was stored is at rest.

        Raises:
            StorageError: something did not get there.
        """

    def close(self) -> None:
        """Give everything up; a second call does nothing."""


class DeviceTier(Tier):
    """State rests where it is used: slots are memory of the device, and nothing moves.

    Args:
        device: this rank's.
    """

    name = "device"
    resident = True
    stays = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reserve(self, label: str, nbytes: int) -> DeviceSlot:
        """Return a slot of new memory."""
        return DeviceSlot(torch.empty(nbytes, dtype=torch.uint8, device=self.device))

    def adopt(self, label: str, tensor: torch.Tensor) -> DeviceSlot:
        """Return a slot of the tensor itself."""
        return DeviceSlot(tensor)


class DeviceSlot(Slot):
    """Memory that is used where it rests.

    Args:
        tensor: uint8, flat.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.resident: torch.Tensor = tensor
        self.nbytes, self.device = tensor.numel(), tensor.device

    def fetch(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        """Return a view, or on another device a copy."""
        part = self.resident[start : self.nbytes if stop is None else stop]
        if device is None or device == part.device:
            return InPlace(part)
        return _Copy(part, part.to(device))

    def blank(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        """Return a view, or on another device memory of the same size."""
        part = self.resident[start : self.nbytes if stop is None else stop]
        if device is None or device == part.device:
            return InPlace(part)
        return _Copy(part, torch.empty_like(part, device=device))

    def free(self) -> None:
        """Let go of the memory."""
        self.resident = self.resident[:0]


class InPlace(Lease):
    """Content where it rests: nothing is brought, and nothing taken away."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def wait(self) -> torch.Tensor:
        """Return the content."""
        return self.tensor

    def store(self) -> Handle:
        """Do nothing: it is there."""
        return Done()

    def release(self) -> None:
        """Do nothing: what was written is there."""


class _Copy(Lease):
    """Content on another device than it rests on."""

    def __init__(self, home: torch.Tensor, tensor: torch.Tensor) -> None:
        self._home = home
        self.tensor = tensor

    def wait(self) -> torch.Tensor:
        return self.tensor

    def store(self) -> Handle:
        self._home.copy_(self.tensor)
        return Done()

    def release(self) -> None:
        pass
