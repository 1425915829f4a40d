"""Parameters of one kind in one flat buffer, of which each rank keeps a slice.

The parameters are views of the whole buffer, always with their true shapes.
Where the whole rests only while it is needed, its storage is resized to zero
in between; the views stay. What the optimizer updates (the masters) are views
of the rank's slice, one for each parameter that the slice touches, or that each
chunk of the slice does.

The slice is what units are gathered from (``source``), in the masters' format and
the masters themselves; unless state rests where the device does not compute. Then
masters of their own rest there, and the source is in the model's format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from powertrain.birth import Birth, settle
from powertrain.layout import FlatEntry, FlatLayout
from powertrain.roles.communicator import Communicator
from powertrain.roles.tier import DeviceSlot, Lease, Slot
from powertrain_zero.arena import Arena
from powertrain_zero.chunk import Chunk, Segment, Tiers, cut, hollow
from powertrain_zero.freed import mark_closed, mark_freed, mark_whole
from powertrain_zero.groups import Groups
from powertrain_zero.units import Named

ALIGN = 16
"""Elements: parameters and shards start at 64 bytes in fp32, as vector units like it."""


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
        tiers: where the slice and its masters rest.
        resident: whether the whole buffer stays; otherwise it is empty until ``allocate``.
        pieces: whether any piece of a parameter may be updated alone.
        whole_tensors: whether each parameter lies in one rank's slice as a whole.
        multiple: the slice's length is a multiple of this many elements.
        align: each parameter starts at a multiple of this many.
        turn: the slice at which whole tensors start to be dealt out.

    Attributes:
        full: the whole buffer; its storage is empty where it does not rest.
        apart: masters are not what is gathered from.
        source: holds this rank's slice, which is gathered from.
        source_dtype: its format.
        chunks: ranges of the slice with their masters, in order.
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
        tiers: Tiers,
        resident: bool,
        pieces: bool = True,
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
        self.master_dtype = master_dtype
        self.begin = groups.index * self.shard_numel
        self.label = f"{self.named[0][0]} … ({len(self.named)} parameters)"
        self.apart = self.trainable and masters_apart(tiers, dtype, master_dtype, communicator.device)
        self.overlaps = self._find_overlaps()
        if resident:
            self.full = communicator.empty(self.numel, dtype, groups.shard)
            self.full.zero_()
        self.source_dtype = dtype if self.apart or (resident and dtype == master_dtype) else master_dtype
        self.source = self._make_source(dtype, tiers, arena)
        limit = self._limit(tiers) if pieces and not whole_tensors else None
        self.chunks = [self._make_chunk(start, stop, tiers) for start, stop in cut(self.shard_numel, limit, align)]
        self._fill(birth)
        if not resident:  # only now: while a first value is computed, there is no second buffer of its size
            self.full = torch.empty(self.numel, dtype=dtype, device=communicator.device)
        for entry, (_, param) in zip(self.layout.entries, self.named, strict=True):
            settle(param, self.full[entry.start : entry.stop].view(entry.shape))
        for chunk in self.chunks:
            self._make_segments(chunk, whole_tensors)
        if not resident:
            self.free()  # views can only be made of memory that is there

    # --- construction -----------------------------------------------------------------

    def _make_source(self, dtype: torch.dtype, tiers: Tiers, arena: Arena) -> Slot:
        """Return where this rank's slice rests."""
        if self.resident and self.source_dtype == dtype:
            return DeviceSlot(self.own(self.full).view(torch.uint8))
        if self.resident or tiers.parameters.stays:
            return DeviceSlot(arena.take(self.shard_numel, self.source_dtype).view(torch.uint8))
        return tiers.parameters.reserve(f"parameters {self.label}", self.shard_numel * self.source_dtype.itemsize)

    def _limit(self, tiers: Tiers) -> int | None:
        """Return how many elements a chunk has at most; None where nothing of it moves."""
        moved = (tiers.optimizer, tiers.gradients) if self.trainable else ()
        grains = [tier.grain for tier in moved if not tier.stays]
        if self.source.resident is None:
            grains.append(tiers.parameters.grain)
        return min(grains) // self.master_dtype.itemsize if grains else None

    def _make_chunk(self, start: int, stop: int, tiers: Tiers) -> Chunk:
        nbytes = (stop - start) * self.master_dtype.itemsize
        place = tiers.optimizer.place(nbytes) if self.trainable else tiers.parameters
        if not self.apart:
            return Chunk(start, stop, self.master_dtype, place, self.source, start * self.master_dtype.itemsize)
        return Chunk(start, stop, self.master_dtype, place, place.reserve(f"masters {self.label}", nbytes), 0)

    def _find_overlaps(self) -> list[tuple[int, int, int]]:
        """Return what this rank's slice has of parameters: their indices, with start and stop in the slice."""
        found = []
        for index, entry in enumerate(self.layout.entries):
            start = max(entry.start, self.begin) - self.begin
            stop = min(entry.stop, self.begin + self.shard_numel) - self.begin
            if start < stop:
                found.append((index, start, stop))
        return found

    def _within(self, chunk: Chunk) -> list[tuple[int, int, int]]:
        """Return what a chunk has of parameters, as ``overlaps``."""
        parts = [(i, max(start, chunk.start), min(stop, chunk.stop)) for i, start, stop in self.overlaps]
        return [(index, start, stop) for index, start, stop in parts if start < stop]

    def _fill(self, birth: Birth) -> None:
        """Take over the first values."""
        if self.resident:
            for entry, (name, param) in zip(self.layout.entries, self.named, strict=True):
                birth.fill(name, param, self.full[entry.start : entry.stop])
            if self.source_dtype == self.full.dtype and not self.apart:
                return
        for chunk in self.chunks:
            lease = chunk.blank()
            masters = lease.wait().view(chunk.dtype)
            masters.zero_()
            for index, start, stop in self._within(chunk):
                name, param = self.named[index]
                first = self.begin + start - self.layout.entries[index].start
                birth.fill(name, param, masters[start - chunk.start : stop - chunk.start], first)
            if self.apart and not self.resident:
                self.write(chunk, masters)
            lease.store()

    def write(self, chunk: Chunk, masters: torch.Tensor) -> None:
        """Convert a chunk's masters to the source's format, and store them there."""
        lease = self.blank(chunk)
        lease.wait().view(self.source_dtype).copy_(masters)
        lease.store()

    @torch.no_grad()
    def refresh(self) -> None:
        """Let what units are gathered from follow masters that were written apart from it."""
        for chunk in self.chunks if self.apart else ():
            lease = chunk.fetch()
            self.write(chunk, lease.wait().view(chunk.dtype))
            lease.release()

    def _make_segments(self, chunk: Chunk, whole_tensors: bool) -> None:
        values = chunk.resident
        for index, start, stop in self._within(chunk):
            entry = self.layout.entries[index]
            shape = entry.shape if whole_tensors else (stop - start,)
            if values is None:
                part = hollow(shape, chunk.dtype, chunk.device)
            else:
                part = values[start - chunk.start : stop - chunk.start].view(shape)
            master = torch.nn.Parameter(part, requires_grad=self.trainable)
            first = self.begin + start - entry.start
            chunk.segments.append(Segment(index, entry.name, entry.shape, first, start, master))
        if values is None:
            chunk.unbind()

    # --- what there is ------------------------------------------------------------------

    @property
    def segments(self) -> list[Segment]:
        """All parts of parameters in this rank's slice."""
        return [segment for chunk in self.chunks for segment in chunk.segments]

    @property
    def shard(self) -> torch.Tensor | None:
        """This rank's slice, where it always lies in memory."""
        return None if self.source.resident is None else self.source.resident.view(self.source_dtype)

    def fetch(self) -> Lease:
        """Start to bring this rank's slice to the device."""
        return self.source.fetch()

    def blank(self, chunk: Chunk) -> Lease:
        """Lend memory for a chunk of the slice, where the chunk is updated."""
        size = self.source_dtype.itemsize
        return self.source.blank(chunk.start * size, chunk.stop * size, chunk.device)

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
        """Carry what was written into the whole buffer over to the slice.

        Elements that were not written keep the precision of the master.
        """
        own = self.own(self.full)
        if self.source.resident is not None and own.data_ptr() == self.source.resident.data_ptr() and not self.apart:
            return
        for chunk in self.chunks:
            lease = chunk.fetch()
            masters, new = lease.wait().view(chunk.dtype), own[chunk.start : chunk.stop].to(chunk.device)
            if new.dtype == masters.dtype:
                masters.copy_(new)
            else:
                masters.copy_(torch.where(masters.to(new.dtype) == new, masters, new.to(masters.dtype)))
            if self.apart and not self.resident:
                self.write(chunk, masters)
            lease.store()


def masters_apart(tiers: Tiers, dtype: torch.dtype, master: torch.dtype, device: torch.device) -> bool:
    """Return whether masters rest apart from what units are gathered from.

    Only where they rest elsewhere than the device, and are another format, used on another device, or updated while
    the model still uses the parameters of before.
    """
    differ = dtype != master or tiers.optimizer.device != device or tiers.optimizer.late > 0
    return not tiers.optimizer.stays and differ


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
