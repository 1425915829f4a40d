"""Parameters of one kind in one flat buffer, of which each rank keeps a slice.

The parameters are views of the whole buffer, always with their true shapes.
Where the whole rests only while it is needed, its storage is resized to zero
in between; the views stay. What the optimizer updates (the masters) are views
of the rank's slice, one for each parameter that the slice touches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from powertrain.birth import Birth, settle
from powertrain.layout import FlatEntry, FlatLayout
from powertrain.roles.checkpoint import TensorSlice
from powertrain.roles.communicator import Communicator
from powertrain.roles.optimizer import device_of_state
from powertrain_zero.arena import Arena
from powertrain_zero.freed import mark_closed, mark_freed, mark_whole
from powertrain_zero.groups import Groups
from powertrain_zero.units import Named

ALIGN = 16
"""Elements: parameters and shards start at 64 bytes in fp32, as vector units like it."""


@attrs.frozen(eq=False)
class Segment:
    """The part of one parameter that lies in this rank's shard.

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

    def of(self, shard: torch.Tensor) -> torch.Tensor:
        """Return this segment of a buffer with the shard's layout, in the master's shape."""
        return shard[self.offset : self.offset + self.master.numel()].view(self.master.shape)

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


class Flat:
    """One flat buffer of a unit.

    Args:
        named: its parameters, all trainable or all frozen, of one type.
        dtype: of the whole buffer, in which the model computes.
        master_dtype: of this rank's slice, which the optimizer updates.
        groups: over which ranks it is sharded.
        communicator: allocates buffers that stay.
        birth: gives the parameters their first values.
        arena: holds slices that are no part of a whole buffer.
        resident: whether the whole buffer stays; otherwise it is empty until ``allocate``.
        whole_tensors: whether each parameter lies in one rank's slice as a whole.
        multiple: the slice's length is a multiple of this many elements.
        align: each parameter starts at a multiple of this many.
        turn: the slice at which whole tensors start to be dealt out.

    Attributes:
        shard: this rank's slice, flat, in ``master_dtype``.
        full: the whole buffer; its storage is empty where it does not rest.
    """

    def __init__(
        self,
        named: Sequence[Named],
        *,
        dtype: torch.dtype,
        master_dtype: torch.dtype,
        groups: Groups,
        communicator: Communicator,
        birth: Birth,
        arena: Arena,
        resident: bool,
        whole_tensors: bool = False,
        multiple: int = ALIGN,
        align: int = ALIGN,
        turn: int = 0,
    ) -> None:
        self.named = list(named)
        self.trainable = named[0][1].requires_grad
        self.layout = flat_layout(
            named, groups.shards, whole_tensors=whole_tensors, multiple=multiple, align=align, turn=turn
        )
        self.numel = self.layout.numel
        self.shard_numel = self.numel // groups.shards
        self.resident = resident
        self.begin = groups.index * self.shard_numel
        self._names = {name: index for index, (name, _) in enumerate(self.named)}
        if resident:
            self.full = communicator.empty(self.numel, dtype, groups.shard)
            self.full.zero_()
        if resident and dtype == master_dtype:
            self.shard = self.own(self.full)
        else:
            self.shard = arena.take(self.shard_numel, master_dtype)
        self._fill(birth)
        if not resident:  # only now: while a first value is computed, there is no second buffer of its size
            self.full = torch.empty(self.numel, dtype=dtype, device=communicator.device)
        for entry, (_, param) in zip(self.layout.entries, self.named, strict=True):
            settle(param, self.full[entry.start : entry.stop].view(entry.shape))
        self.segments = [
            self._segment(index, entry, whole_tensors) for index, entry in enumerate(self.layout.entries)
            if self._overlap(entry)[0] < self._overlap(entry)[1]
        ]  # fmt: skip
        if not resident:
            self.free()  # views can only be made of memory that is there

    def _fill(self, birth: Birth) -> None:
        """Take over the first values."""
        for entry, (name, param) in zip(self.layout.entries, self.named, strict=True):
            if self.resident:
                birth.fill(name, param, self.full[entry.start : entry.stop])
            start, stop = self._overlap(entry)
            if start < stop and (not self.resident or self.full.dtype != self.shard.dtype):
                birth.fill(name, param, self.shard[start - self.begin : stop - self.begin], start - entry.start)

    def _overlap(self, entry: FlatEntry) -> tuple[int, int]:
        """Return where a parameter and this rank's slice meet, in elements of the buffer."""
        return max(entry.start, self.begin), min(entry.stop, self.begin + self.shard_numel)

    def _segment(self, index: int, entry: FlatEntry, whole_tensors: bool) -> Segment:
        start, stop = self._overlap(entry)
        offset = start - self.begin
        part = self.shard[offset : offset + stop - start]
        master = torch.nn.Parameter(part.view(entry.shape) if whole_tensors else part, requires_grad=self.trainable)
        return Segment(index, self.named[index][0], entry.shape, start - entry.start, offset, master)

    def own(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of a buffer with the whole layout."""
        return buffer[self.begin : self.begin + self.shard_numel]

    def view(self, buffer: torch.Tensor, index: int) -> torch.Tensor:
        """Return one parameter's part of a buffer with the whole layout."""
        entry = self.layout.entries[index]
        return buffer[entry.start : entry.stop].view(entry.shape)

    def gaps(self) -> list[tuple[int, int]]:
        """Return the parts of the buffer that belong to no parameter."""
        result, end = [], 0
        for entry in sorted(self.layout.entries, key=lambda entry: entry.start):
            if entry.start > end:
                result.append((end, entry.start))
            end = max(end, entry.stop)
        if end < self.numel:
            result.append((end, self.numel))
        return result

    def allocate(self) -> None:
        """Give the whole buffer its memory."""
        self.full.untyped_storage().resize_(self.numel * self.full.element_size())

    def expose(self) -> None:
        """Let the parameters be used: the whole buffer holds them."""
        for _, param in self.named:
            mark_whole(param)

    def free(self) -> None:
        """Take the whole buffer's memory away; touching a parameter is an error from now on."""
        for name, param in self.named:
            mark_freed(param, name)
        self.full.untyped_storage().resize_(0)

    def close(self) -> None:
        """Let the error of touching a freed parameter say that nothing will gather it any more."""
        for _, param in self.named:
            mark_closed(param)

    @torch.no_grad()
    def take_back(self) -> None:
        """Carry what was written into the whole buffer over to the shard.

        Elements that were not written keep the precision of the master.
        """
        own = self.own(self.full)
        if own.data_ptr() == self.shard.data_ptr():
            return
        if own.dtype == self.shard.dtype:
            self.shard.copy_(own)
        else:
            self.shard.copy_(torch.where(self.shard.to(own.dtype) == own, self.shard, own.to(self.shard.dtype)))


def flat_layout(
    named: Sequence[Named],
    shards: int,
    *,
    whole_tensors: bool = False,
    multiple: int = ALIGN,
    align: int = ALIGN,
    turn: int = 0,
) -> FlatLayout:
    """Lay parameters out in a buffer of ``shards`` equal slices.

    Args:
        named: the parameters.
        shards: the number of slices.
        whole_tensors: put each parameter into one slice as a whole, the largest
            first into the slice with most room; slices are padded to the fullest.
        multiple: a slice's length is a multiple of this.
        align: each parameter starts at a multiple of this; so does a slice, if ``multiple`` is one.
        turn: the slice at which whole tensors start to be dealt out. Units of one shape with a turn each give every
            rank as much to compute, though not every unit has a tensor for each.
    """
    sizes = [(name, tuple(param.shape)) for name, param in named]
    if not whole_tensors or shards == 1:
        return FlatLayout.build(sizes, align=align, multiple=shards * multiple)
    loads = [0] * shards
    order = [(turn + number) % shards for number in range(shards)]
    places: dict[str, tuple[int, int]] = {}
    for name, shape in sorted(sizes, key=lambda item: -math.prod(item[1])):
        slot = min(order, key=loads.__getitem__)
        places[name] = (slot, loads[slot])
        loads[slot] += -(-math.prod(shape) // align) * align
    length = -(-max(loads) // multiple) * multiple
    entries = tuple(FlatEntry(name, shape, places[name][0] * length + places[name][1]) for name, shape in sizes)
    return FlatLayout(entries, shards * length)
