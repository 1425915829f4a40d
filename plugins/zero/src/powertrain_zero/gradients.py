"""The gradients of one flat buffer, on their way to the mean of this rank's shard.

Each gradient is moved into a whole buffer as soon as autograd has it. At stage 1,
several micro-batches add up in one such buffer that stays, and is reduced once
a step. From stage 2 on, and for a single micro-batch, the buffer is borrowed for
the time between the first gradient and the end of the reduction, and shards add up,
where they rest: those that rest elsewhere than on the device leave as soon as a
reduction has ended.
"""

from __future__ import annotations

from collections import deque

import torch

from powertrain.compat import owns_its_memory
from powertrain.roles.communicator import Communicator, Handle
from powertrain.roles.tier import DeviceSlot, Lease, Slot, Tier
from powertrain_zero.arena import Arena
from powertrain_zero.flat import Flat
from powertrain_zero.groups import Groups
from powertrain_zero.wire import ReduceWire

IN_FLIGHT = 2
"""Reductions under way at once, each with a borrowed buffer: one is on the wire while the next fills."""


def add_up_whole(stage: int, shards: int, accumulation: int) -> bool:
    """Return whether gradients add up in whole buffers until the step: those of one micro-batch need none."""
    return stage == 1 and (accumulation > 1 or shards == 1)


class BufferPool:
    """Borrowed flat buffers, given back for the next unit: fresh memory is slow to touch.

    Units are mostly of one size, and few are far larger: buffers for those are not kept.

    Args:
        communicator: allocates them.
        dimension: along which they are reduced.
        dtype: of their elements, the format that travels.
    """

    def __init__(self, communicator: Communicator, dimension: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._communicator = communicator
        self._dimension = dimension
        self._sizes: list[int] = []
        self._free: list[torch.Tensor] = []

    def fit(self, numel: int) -> None:
        """Take note that buffers of ``numel`` elements will be borrowed."""
        self._sizes.append(numel)
        self._sizes.sort()

    @property
    def _kept_size(self) -> int:
        """The size of the buffers that are kept: the largest that is not far above the median."""
        typical = self._sizes[len(self._sizes) // 2]
        return max(size for size in self._sizes if size <= 1.5 * typical)

    def borrow(self, numel: int) -> torch.Tensor:
        """Return a buffer of at least ``numel`` elements with arbitrary contents."""
        kept = self._kept_size
        if numel > kept:
            return self._communicator.empty(numel, self.dtype, self._dimension)
        return self._free.pop() if self._free else self._communicator.empty(kept, self.dtype, self._dimension)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Take a buffer for the next borrower."""
        if buffer.numel() == self._kept_size and len(self._free) < IN_FLIGHT:
            self._free.append(buffer)

    def trim(self) -> None:
        """Free what nobody uses: between steps there are no gradients on their way."""
        self._free.clear()


class FlatGradients:
    """Collects and reduces the gradients of one flat.

    Args:
        flat: whose gradients they are.
        groups: over which ranks they are averaged.
        communicator: connects the ranks.
        wire: how they travel within the shard group.
        pool: lends buffers in the format that travels.
        flights: reductions under way, of all flats; the oldest is ended when there are too many.
        accumulate: the format in which they add up.
        arena: holds the shards that rest on the device.
        tier: where the shards rest.
        whole: whether micro-batches add up in a whole buffer (stage 1) or in the shard.

    Attributes:
        used: for each parameter, whether it got a gradient in this step on this rank.
        anywhere: the same on any rank, once the ranks have agreed.
        seen: the format in which the optimizer sees them, and norms are of.
    """

    def __init__(
        self,
        flat: Flat,
        groups: Groups,
        communicator: Communicator,
        wire: ReduceWire,
        pool: BufferPool,
        flights: deque[FlatGradients],
        accumulate: torch.dtype,
        arena: Arena,
        tier: Tier,
        *,
        whole: bool,
    ) -> None:
        self.flat = flat
        self.dtype = self.seen = accumulate
        self.used = [False] * len(flat.named)
        self.anywhere = [False] * len(flat.named)
        self._groups = groups
        self._communicator = communicator
        self._wire = wire
        self._pool = pool
        self._flights = flights
        self._gaps = flat.gaps()
        self._whole = communicator.empty(flat.numel, accumulate, groups.shard) if whole else None
        self._slot = self._make_slot(tier, arena)
        self._lease: Lease | None = None  # of a shard that rests elsewhere, while a reduction is under way
        self._norms: list[torch.Tensor] = []
        self._open: torch.Tensor | None = None  # where gradients go that have not been sent
        self._filled = [False] * len(flat.named)  # which parts of it are defined
        # What is waited for before a reduction starts: everything, and after a step what any step has used.
        self._expected = [True] * len(flat.named)
        self._ever = [False] * len(flat.named)
        self._missing = len(flat.named)
        self._arrived = [False] * len(flat.named)
        self._flight: tuple[Handle, torch.Tensor] | None = None
        self._crossing: Handle | None = None
        self._begun = False  # the shard holds a part of this step
        self._early = False  # it was sent incomplete in this micro-batch
        pool.fit(flat.numel)

    def _make_slot(self, tier: Tier, arena: Arena) -> Slot:
        """Return where the shard rests."""
        if self._whole is not None:
            return DeviceSlot(self.flat.own(self._whole).view(torch.uint8))
        if tier.stays:
            return DeviceSlot(arena.take(self.flat.shard_numel, self.dtype).view(torch.uint8))
        return tier.reserve(f"gradients {self.flat.label}", self.flat.shard_numel * self.dtype.itemsize)

    @property
    def shard(self) -> torch.Tensor | None:
        """The mean gradient of this rank's shard, once all is settled; None where it rests elsewhere."""
        return None if self._slot.resident is None else self._slot.resident.view(self.dtype)

    def fetch(self, start: int, stop: int, device: torch.device) -> Lease:
        """Start to bring elements of the shard to a device."""
        size = self.dtype.itemsize
        return self._slot.fetch(start * size, stop * size, device)

    def norms(self) -> list[tuple[int, torch.Tensor]]:
        """Return the parameters that the ranks have agreed to have a gradient, with the norms of what lies here."""
        shard = self.shard
        found = self._norms if shard is None else self._norms_of(shard)
        indices = [index for index, _, _ in self.flat.overlaps]
        return [(index, norm) for index, norm in zip(indices, found, strict=True) if self.anywhere[index]]

    def _norms_of(self, shard: torch.Tensor) -> list[torch.Tensor]:
        # A norm in 16 bits rounds, or is beyond their range.
        dtype = torch.float32 if self.seen.itemsize < 4 else self.seen
        parts = [shard[start:stop].to(self.seen) for _, start, stop in self.flat.overlaps]
        return [torch.linalg.vector_norm(part, dtype=dtype) for part in parts]

    @property
    def complete(self) -> bool:
        """Whether each parameter that is waited for has got its gradient since ``begin``.

        One that no step so far has used is not waited for; see ``learn``.
        """
        return self._missing == 0

    @property
    def waiting(self) -> bool:
        """Whether there are gradients that were not sent."""
        return self._open is not None

    @property
    def sent_early(self) -> bool:
        """Whether there are gradients that were not sent because they came after what they belong to."""
        return self._early and self.waiting

    def begin(self, *, first: bool) -> None:
        """Prepare for a micro-batch; the first one of a step forgets the old gradients."""
        if first:
            self.drop()
        self._missing = sum(self._expected)
        self._arrived = [False] * len(self._arrived)
        self._early = False

    def learn(self) -> None:
        """Expect, from the end of this step on, what this rank has used so far."""
        self._ever = [before or now for before, now in zip(self._ever, self.used, strict=True)]
        self._expected = self._ever

    def is_expected(self, index: int) -> bool:
        """Return whether a gradient of parameter ``index`` is waited for."""
        return self._expected[index]

    def expect_all(self) -> None:
        """Wait for every parameter again, until the end of this step: one was used for the first time."""
        self._expected = [True] * len(self._arrived)
        self._missing = self._arrived.count(False)

    def drop(self) -> None:
        """Forget all gradients of this step."""
        self.settle()
        self._close()
        self._begun = False
        self.used = [False] * len(self.used)

    def add(self, index: int, grad: torch.Tensor) -> None:
        """Take the gradient of parameter ``index``."""
        if self._open is None and self._may_take(grad):
            self._open, self._filled = grad.view(-1), [True]
        else:
            self._put(index, grad)
        self.used[index] = True
        if not self._arrived[index]:
            self._arrived[index] = True
            self._missing -= self._expected[index]

    def _may_take(self, grad: torch.Tensor) -> bool:
        """Return whether a gradient can be the buffer itself: that of the only parameter, as a large one is.

        Not where others see its memory: autograd hands out views of a gradient that is still on its way elsewhere.
        """
        alone = len(self._filled) == 1 and grad.numel() == self.flat.numel and self._whole is None
        fits = alone and grad.dtype == self._pool.dtype and grad.is_contiguous() and not grad.requires_grad
        return fits and owns_its_memory(grad)

    def _put(self, index: int, grad: torch.Tensor) -> None:
        """Copy a gradient into the buffer, or add it to what is there."""
        if self._open is None:
            # What a whole buffer holds of a step that was reduced already is not to be added again.
            fresh = not self._begun and self._flight is None
            self._open = self._whole if fresh and self._whole is not None else self._borrow()
            self._filled = [False] * len(self._filled)
        view = self.flat.view(self._open, index)
        if self._filled[index]:
            view.add_(grad)
        else:
            view.copy_(grad)
            self._filled[index] = True

    def _borrow(self) -> torch.Tensor:
        while len(self._flights) >= IN_FLIGHT:
            self._flights[0].settle()
        return self._pool.borrow(self.flat.numel)

    def send(self) -> None:
        """Start the reduction of what there is; parameters without a gradient count as zeros."""
        self._early = self._early or not self.complete
        # The oldest first, the same on all ranks; what a reduction receives into is memory, too.
        while self._flight is not None or len(self._flights) >= IN_FLIGHT:
            self._flights[0].settle()
        if self._open is None:
            self._open = self._borrow()
            self._filled = [False] * len(self._filled)
        buffer = self._open
        for index, filled in enumerate(self._filled):
            if not filled:
                self.flat.view(buffer, index).zero_()
        for start, stop in self._gaps:
            buffer[start:stop].zero_()
        if buffer.dtype != self._pool.dtype:
            # It was kept in a more exact format than the one that travels.
            buffer = self._borrow()
            buffer[: self.flat.numel].copy_(self._open)
        whole = buffer[: self.flat.numel]
        if self._slot.resident is None:
            self._lease = self._slot.fetch() if self._begun else self._slot.blank()
        # The first reduction of a step leaves its result where the shard is; later ones are added.
        direct = not self._begun and self.dtype == whole.dtype
        output = self._present() if direct else self.flat.own(whole)
        self._flight = (self._wire.reduce(output, whole, f"gradients of {self.flat.label}"), buffer)
        self._flights.append(self)
        self._open = None

    def _present(self) -> torch.Tensor:
        """Return the shard in memory, that which is on loan where it rests elsewhere."""
        shard = self.shard if self._lease is None else self._lease.wait().view(self.dtype)
        assert shard is not None, "a shard that rests elsewhere is touched while it is not on loan"
        return shard

    def _put_away(self) -> None:
        """Send a shard that was on loan to where it rests; its norms are known then."""
        if self._lease is not None:
            self._norms = self._norms_of(self._present())
            self._lease.store()
            self._lease = None

    def settle(self) -> None:
        """Wait for the reduction under way, and add its result to the shard."""
        if self._crossing is not None:
            self._crossing.wait()
            self._crossing = None
            self._put_away()
        if self._flight is None:
            return
        handle, buffer = self._flight
        self._flight = None
        self._flights.remove(self)
        handle.wait()
        own, shard = self.flat.own(buffer), self._present()
        if self._begun:
            shard.add_(own)
        elif shard.dtype != own.dtype:
            shard.copy_(own)
        self._begun = True
        self._put_away()
        if buffer is not self._whole:
            self._pool.give_back(buffer)

    def _close(self) -> None:
        if self._open is not None and self._open is not self._whole:
            self._pool.give_back(self._open)
        self._open = None

    def across(self) -> None:
        """Start the averaging of the shard over replicas; its reduction is awaited first."""
        self.settle()
        assert self._groups.replica is not None
        if self._slot.resident is None:
            self._lease = self._slot.fetch()
        shard = self._present()
        label = f"gradients of {self.flat.named[0][0]} … across replicas"
        self._crossing = self._communicator.all_reduce(
            shard, self._groups.replica, reduction="mean", label=label, lossy=shard.numel()
        )
        if self._lease is not None:  # one at a time: together they are what does not fit
            self.settle()
