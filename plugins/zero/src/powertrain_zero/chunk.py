"""Ranges of a shard that are updated, and travel, in one go.

Where everything rests on the device, a flat buffer's shard is one chunk. State that rests elsewhere comes
chunk by chunk, so that while one is updated the next is on its way here and the last on its way back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from powertrain.context import Context
from powertrain.roles.checkpoint import TensorSlice
from powertrain.roles.optimizer import device_of_state
from powertrain.roles.tier import Lease, Slot, Tier
from powertrain_zero.freed import mark_freed, mark_whole

PAGE = 4096
"""Elements: chunks start at multiples of it, so that disks can move each alone in whole blocks."""


@attrs.frozen
class Tiers:
    """Where this rank's share of a run's state rests.

    Attributes:
        optimizer: masters and optimizer state.
        gradients: mean gradients.
        parameters: what units are gathered from.
    """

    optimizer: Tier
    gradients: Tier
    parameters: Tier

    @classmethod
    def of(cls, context: Context) -> Tiers:
        """Return the tiers of a run."""
        return cls(context.tier("optimizer"), context.tier("gradients"), context.tier("parameters"))

    @property
    def stay(self) -> bool:
        """Whether everything rests on the device."""
        return self.optimizer.stays and self.gradients.stays and self.parameters.stays


@attrs.frozen(eq=False)
class Segment:
    """The part of one parameter that lies in one chunk of this rank's shard.

    Attributes:
        index: of the parameter's entry in the layout.
        name: the parameter's global name.
        shape: its global shape.
        start: the first element, counted in the parameter.
        offset: the first element, counted in the shard.
        master: what the optimizer updates, a view of the shard.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    start: int
    offset: int
    master: torch.nn.Parameter

    def of(self, shard: torch.Tensor, base: int = 0) -> torch.Tensor:
        """Return this segment of a buffer with the shard's layout from element ``base`` on, in the master's shape."""
        first = self.offset - base
        return shard[first : first + self.master.numel()].view(self.master.shape)

    def is_cut(self, key: str, shape: Sequence[int]) -> bool:
        """Return whether an entry of optimizer state goes with the parameter's elements: not a step count."""
        return tuple(shape) == self.shape and key != "step"

    def share(self, key: str, value: Any, dtype: torch.dtype, group: Mapping[str, Any], block: int = 0) -> Any:
        """Return this segment's part of a whole parameter's optimizer state, a copy where the master's rests.

        Args:
            key: of the entry.
            value: a tensor of the parameter's shape, another tensor, or anything else, which stays as it is.
            dtype: of the result, where it goes with the elements and is floating-point.
            group: the parameter's group.
            block: it has one element for so many of the parameter's; 0: it has not.
        """
        if not isinstance(value, torch.Tensor) or value.is_meta:
            return value
        if block:
            first = self.start // block
            return value.detach()[first : first + self.blocks(block)].to(self.master.device, copy=True)
        if not self.is_cut(key, value.shape):
            return value.detach().to(device_of_state(key, group, self.master.device), copy=True)
        part = value.detach().reshape(-1)[self.start : self.start + self.master.numel()].view(self.master.shape)
        return part.to(self.master.device, dtype if part.is_floating_point() else part.dtype, copy=True)

    def blocks(self, block: int) -> int:
        """Return how many blocks of a length this segment has; it starts where one does."""
        return -(-self.master.numel() // block)

    def slice(self, prefix: str, tensor: torch.Tensor, block: int = 0) -> TensorSlice:
        """Return ``tensor`` as a slice of a global one.

        What has not the master's shape (a step count, a factored moment of a whole tensor) is a global tensor itself,
        unless it has one element for each ``block`` of the parameter's.
        """
        if block:
            shape = (-(-math.prod(self.shape) // block),)
            return TensorSlice(prefix, shape, tensor.detach(), self.start // block)
        if tensor.shape != self.master.shape:
            return TensorSlice(prefix, tuple(tensor.shape), tensor.detach().reshape(-1))
        return TensorSlice(prefix, self.shape, tensor.detach().reshape(-1), self.start)


class Chunk:
    """Consecutive segments of a shard: their masters, and where these rest.

    Args:
        start: the first element, counted in the shard.
        stop: the end of it.
        dtype: of the masters.
        place: where the optimizer's state of it rests.
        slot: holds the masters.
        base: the masters' first byte in the slot.

    Attributes:
        segments: the parts of parameters in it, added by the flat buffer.
    """

    def __init__(self, start: int, stop: int, dtype: torch.dtype, place: Tier, slot: Slot, base: int) -> None:
        self.start, self.stop = start, stop
        self.dtype = dtype
        self.place = place
        self.segments: list[Segment] = []
        self._slot, self._base = slot, base

    @property
    def device(self) -> torch.device:
        """Where it is updated."""
        return self.place.device

    @property
    def resident(self) -> torch.Tensor | None:
        """The masters, flat, where they always lie in memory; None where they must be fetched."""
        if self._slot.resident is None:
            return None
        return self._slot.resident[self._base : self._end].view(self.dtype)

    @property
    def _end(self) -> int:
        return self._base + (self.stop - self.start) * self.dtype.itemsize

    def fetch(self) -> Lease:
        """Start to bring the masters to where they are updated."""
        return self._slot.fetch(self._base, self._end, self.device)

    def blank(self) -> Lease:
        """Lend memory for new masters."""
        return self._slot.blank(self._base, self._end, self.device)

    def slice(self, prefix: str, segment: Segment) -> TensorSlice:
        """Return a segment's masters as a slice of the global tensor, wherever they rest."""
        if self._slot.resident is not None:
            return segment.slice(prefix, segment.master)
        first = self._base + (segment.offset - self.start) * self.dtype.itemsize
        return TensorSlice.at_rest(
            prefix, segment.shape, self.dtype, segment.master.numel(), segment.start, self._slot, first
        )

    def bind(self, masters: torch.Tensor) -> None:
        """Let the masters be views of ``masters``, flat bytes that a lease holds."""
        values = masters.view(self.dtype)
        for segment in self.segments:
            mark_whole(segment.master)
            segment.master.data = segment.of(values, self.start)

    def unbind(self) -> None:
        """Take the masters' memory away; touching one is an error until ``bind``."""
        for segment in self.segments:
            mark_whole(segment.master)  # it may be without memory already
            segment.master.data = hollow(segment.master.shape, self.dtype, self.device)
            mark_freed(segment.master, segment.name)


def hollow(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of this shape that has the memory of one element."""
    return torch.zeros(1, dtype=dtype, device=device).expand(tuple(shape))


def cut(numel: int, limit: int | None, align: int) -> list[tuple[int, int]]:
    """Cut a shard into chunks of about ``limit`` elements; None: one chunk.

    Args:
        numel: of the shard.
        limit: the most elements of a chunk, where it may be cut.
        align: chunks start at multiples of this (and of ``PAGE``).
    """
    step = numel if limit is None else math.lcm(align, PAGE) * max(1, limit // math.lcm(align, PAGE))
    return [(start, min(start + step, numel)) for start in range(0, numel, max(step, 1))] or [(0, 0)]
