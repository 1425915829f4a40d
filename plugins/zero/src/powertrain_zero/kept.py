"""The optimizer's state of one chunk, where it rests between updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import attrs
import torch

from powertrain.roles.checkpoint import TensorSlice
from powertrain.roles.tier import Lease, Slot
from powertrain_zero.chunk import Chunk, Segment

_ALIGN = 64
"""Bytes: each tensor starts at a multiple, as vector units like it."""


@attrs.frozen(eq=False)
class Entry:
    """One tensor of state.

    Attributes:
        segment: whose it is.
        key: what the optimizer calls it.
        shape: its shape.
        dtype: its format.
        start: its first byte in the slot.
    """

    segment: Segment
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def stop(self) -> int:
        """The end of it."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def of(self, data: torch.Tensor) -> torch.Tensor:
        """Return the tensor within the bytes of the slot."""
        return data[self.start : self.stop].view(self.dtype).view(self.shape)

    def is_like(self, other: Entry) -> bool:
        """Return whether another entry describes the same tensor at the same place."""
        return (self.segment, self.key, self.shape, self.dtype, self.start) == (
            other.segment, other.key, other.shape, other.dtype, other.start,
        )  # fmt: skip


class KeptState:
    """Brings what the optimizer keeps of a chunk, and takes it away again.

    What is kept is found after an update: tensors that have dimensions. Step counts and what is
    no tensor stay with the optimizer.

    Args:
        chunk: whose state it is.
        state: the optimizer's ``state``.
        label: of the chunk, for people.
    """

    def __init__(self, chunk: Chunk, state: MutableMapping[torch.Tensor, Any], label: str) -> None:
        self._chunk = chunk
        self._state = state
        self._label = label
        self._slot: Slot | None = None
        self._entries: list[Entry] = []
        self._lease: Lease | None = None

    def fetch(self) -> None:
        """Start to bring it to where the chunk is updated."""
        if self._slot is not None and self._lease is None:
            self._lease = self._slot.fetch(0, None, self._chunk.device)

    def bind(self) -> None:
        """Let the optimizer have it."""
        self.fetch()
        if self._lease is None:
            return
        data = self._lease.wait()
        for entry in self._entries:
            self._state[entry.segment.master][entry.key] = entry.of(data)

    def put_away(self) -> bool:
        """Take it from the optimizer, and start to bring it to where it rests; return whether it is other state."""
        entries = self._found()
        old, lease = self._entries, self._lease
        same = len(entries) == len(old) and all(map(Entry.is_like, entries, old))
        if not same:
            if lease is not None:
                lease.release()
            if self._slot is not None:
                self._slot.free()
            self._slot = lease = None
            if entries:
                self._slot = self._chunk.place.reserve(f"optimizer state {self._label}", entries[-1].stop)
                lease = self._slot.blank(0, None, self._chunk.device)
            self._entries = entries
        if lease is not None:
            data = lease.wait()
            for entry in entries:
                value = self._state[entry.segment.master].pop(entry.key)
                target = entry.of(data)
                if value.data_ptr() != target.data_ptr():
                    target.copy_(value)
            lease.store()
        self._lease = None
        return not same

    def release(self) -> None:
        """End a loan without keeping what was changed."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None
            for entry in self._entries:
                self._state[entry.segment.master].pop(entry.key, None)

    def slices_of(self, segment: Segment, name: str, blocks: Mapping[str, int]) -> Iterator[tuple[str, TensorSlice]]:
        """Yield what rests of a segment as slices of a global tensor called ``name``, by key."""
        assert self._slot is not None or not self._entries
        for entry in self._entries:
            if entry.segment is segment and self._slot is not None:
                yield entry.key, _slice(name, entry, self._slot, blocks.get(entry.key, 0))

    def expect(self, wanted: Sequence[tuple[Segment, str, tuple[int, ...], torch.dtype]]) -> Expected:
        """Make room for other state, which takes the place of what is here once it is ``keep``ed."""
        entries = _laid_out(wanted)
        slot = self._chunk.place.reserve(f"optimizer state {self._label}", entries[-1].stop) if entries else None
        return Expected(entries, slot)

    def keep(self, expected: Expected) -> None:
        """Take over state that was filled in."""
        self.release()
        if self._slot is not None:
            self._slot.free()
        self._slot, self._entries = expected.slot, expected.entries

    def _found(self) -> list[Entry]:
        """Return the tensors with dimensions that the optimizer has of the chunk now, laid out one after the other."""
        return _laid_out(
            (segment, key, tuple(value.shape), value.dtype)
            for segment in self._chunk.segments
            for key, value in self._state.get(segment.master, {}).items()
            if isinstance(value, torch.Tensor) and value.ndim > 0
        )


@attrs.frozen(eq=False)
class Expected:
    """Room for state that is still to be filled in.

    Attributes:
        entries: what it will be.
        slot: where; None if there is nothing.
    """

    entries: list[Entry]
    slot: Slot | None

    def slices(self, prefix: str, blocks: Mapping[str, int]) -> Iterator[TensorSlice]:
        """Yield what is to be filled in, as slices of global tensors called ``prefix/<parameter>/<key>``."""
        for entry in self.entries:
            assert self.slot is not None
            name = f"{prefix}/{entry.segment.name}/{entry.key}"
            yield _slice(name, entry, self.slot, blocks.get(entry.key, 0))

    def free(self) -> None:
        """Give the room up."""
        if self.slot is not None:
            self.slot.free()


def _slice(name: str, entry: Entry, slot: Slot, block: int) -> TensorSlice:
    """Return an entry as a slice of a global tensor; see ``Segment.slice``."""
    segment, shape, start = entry.segment, entry.shape, 0
    if block:
        shape, start = (-(-math.prod(segment.shape) // block),), segment.start // block
    elif entry.shape == tuple(segment.master.shape):
        shape, start = segment.shape, segment.start
    return TensorSlice.at_rest(name, shape, entry.dtype, math.prod(entry.shape), start, slot, entry.start)


def _laid_out(wanted: Iterable[tuple[Segment, str, tuple[int, ...], torch.dtype]]) -> list[Entry]:
    """Lay tensors out in a slot, one after the other."""
    entries: list[Entry] = []
    end = 0
    for segment, key, shape, dtype in wanted:
        entry = Entry(segment, key, shape, dtype, -(-end // _ALIGN) * _ALIGN)
        entries.append(entry)
        end = entry.stop
    return entries
