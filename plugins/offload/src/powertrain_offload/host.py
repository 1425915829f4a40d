"""The tier of host memory, for devices that have memory of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from powertrain.roles.accelerator import Accelerator
from powertrain.roles.communicator import Done, Handle
from powertrain.roles.tier import InPlace, Lease, Slot, Tier

_HOST = torch.device("cpu")


class HostTier(Tier):
    """State rests in the host's memory, page-locked where the accelerator has such a thing.

    Args:
        accelerator: of the device; its streams carry copies beside compute.
        compute: the device.
        device: where content is used: the device, or the host itself.
        grain: bytes that are best moved at a time.
        check: is told of the bytes that are to come, and refuses what there is no room for.
    """

    name = "host"

    def __init__(
        self,
        accelerator: Accelerator,
        compute: torch.device,
        device: torch.device,
        grain: int,
        check: Callable[[int], None] | None = None,
    ) -> None:
        self.device = device
        self.grain = grain
        self.resident = device.type == _HOST.type
        self._check = check
        self.accelerator = accelerator
        self.stream = accelerator.stream(compute) if "streams" in accelerator.capabilities else None

    def expect(self, nbytes: int) -> None:
        """Take note of what is to come.

        Raises:
            HostMemoryShort: the host has less.
        """
        if self._check is not None:
            self._check(nbytes)

    def reserve(self, label: str, nbytes: int) -> HostSlot:
        """Return a slot of host memory."""
        memory = torch.empty(nbytes, dtype=torch.uint8)
        pinned = "pinned" in self.accelerator.capabilities and nbytes > 0
        return HostSlot(self, self.accelerator.pin(memory) if pinned else memory)

    def settle(self) -> None:
        """Wait until what devices have stored is here."""
        self.accelerator.finish(self.accelerator.record(self.stream))


class HostSlot(Slot):
    """Host memory."""

    def __init__(self, tier: HostTier, memory: torch.Tensor) -> None:
        self.tier = tier
        self.device = tier.device
        self.memory = memory
        self.nbytes = memory.numel()
        self.resident = memory if tier.resident else None
        self.moving: object = None  # the event after which no copy from or to a device is under way

    def fetch(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        """Return the memory itself on the host; start to copy it to a device."""
        return self._lend(start, stop, device or self.device, full=True)

    def blank(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        """Return the memory itself on the host, or memory of a device."""
        return self._lend(start, stop, device or self.device, full=False)

    def free(self) -> None:
        """Let go of the memory, once nothing is on its way into it or out of it."""
        self.settle()
        self.memory = self.memory[:0]
        self.resident = None

    def settle(self) -> None:
        """Let the host wait until what a device has stored is here, and what it has fetched is there."""
        if self.moving is not None:
            self.tier.accelerator.finish(self.moving)
            self.moving = None

    def _lend(self, start: int, stop: int | None, device: torch.device, *, full: bool) -> Lease:
        part = self.memory[start : self.nbytes if stop is None else stop]
        if device.type == _HOST.type:
            self.settle()
            return InPlace(part)
        return _OnDevice(self, part, device, full=full)


class _OnDevice(Lease):
    """A copy on a device, brought and taken away beside what it computes."""

    def __init__(self, slot: HostSlot, home: torch.Tensor, device: torch.device, *, full: bool) -> None:
        self._slot, self._home = slot, home
        self._event: object = None
        tier = slot.tier
        if not full:
            self.tensor = torch.empty(home.shape, dtype=home.dtype, device=device)
            return
        with tier.accelerator.use_stream(tier.stream):
            # Memory of the stream that copies: what is queued on others may still use what theirs would give.
            self.tensor = torch.empty(home.shape, dtype=home.dtype, device=device)
            self.tensor.copy_(home, non_blocking=tier.stream is not None)
            self._event = slot.moving = tier.accelerator.record(tier.stream)

    def wait(self) -> torch.Tensor:
        if self._event is not None:
            self._slot.tier.accelerator.wait(None, self._event)
            self._slot.tier.accelerator.share(self.tensor, None)
            self._event = None
        return self.tensor

    def store(self) -> Handle:
        tier = self._slot.tier
        computed = tier.accelerator.record(None)
        with tier.accelerator.use_stream(tier.stream):
            tier.accelerator.wait(tier.stream, computed)
            self._home.copy_(self.tensor, non_blocking=tier.stream is not None)
            tier.accelerator.share(self.tensor, tier.stream)  # whoever lent it lets go of it now
            self._slot.moving = tier.accelerator.record(tier.stream)
        return Done()

    def release(self) -> None:
        pass
