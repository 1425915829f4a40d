"""Slices of tensors: whole tensors lent as flat slices, and the slices of all ranks put together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from powertrain.errors import ShardingError
from powertrain.layout import Box
from powertrain.roles.checkpoint import TensorSlice
from powertrain.roles.communicator import Communicator

_BITS = {4: torch.int32, 8: torch.int64}


def bits(flat: torch.Tensor) -> torch.Tensor:
    """Return a flat tensor's bits as integers: they add to zeros exactly, -0.0 and NaN included."""
    return flat.view(_BITS.get(flat.element_size(), torch.uint8))


def index(box: Box) -> tuple[slice, ...]:
    """Return what selects a box of a tensor."""
    return tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))


class FlatViews:
    """Lends whole tensors as flat slices that may be written.

    A contiguous tensor is lent as a view of itself. Other memory formats have no
    flat view in row-major order: they are lent as copies, and ``put_back``
    brings what was written into a copy home.
    """

    def __init__(self) -> None:
        self._copies: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = {}  # as lent, and as it was then

    def lend(self, name: str, tensor: torch.Tensor) -> TensorSlice:
        """Return all of ``tensor`` as a slice called ``name``."""
        data = tensor.detach()
        if data.is_contiguous():
            return TensorSlice(name, tuple(data.shape), data.view(-1))
        copy, before = self._copies.get(tensor, (None, None))
        if copy is None or before is None:
            copy = data.reshape(-1)
            self._copies[tensor] = (copy, copy.clone())
        elif torch.equal(bits(copy), bits(before)):  # unwritten, so the tensor's own values are the newer ones
            copy.view(data.shape).copy_(data)
            before.copy_(copy)
        return TensorSlice(name, tuple(data.shape), copy)

    def put_back(self) -> None:
        """Copy what was written into copies to their tensors, and forget the copies."""
        for tensor, (copy, before) in self._copies.items():
            if not torch.equal(bits(copy), bits(before)):
                tensor.detach().copy_(copy.view(tensor.shape))
        self._copies.clear()


@attrs.frozen
class Place:
    """Where one rank's slice lies in its tensor.

    Attributes:
        shape: the global shape.
        dtype: the element type.
        start: the first element.
        numel: how many elements the rank holds.
        whole: False for a slice of a block, which ``start`` counts in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    numel: int
    whole: bool

    @classmethod
    def of(cls, piece: TensorSlice) -> Place:
        """Return the place of a slice."""
        return cls(tuple(piece.shape), piece.tensor.dtype, piece.start, piece.tensor.numel(), piece.block is None)

    def to_json(self) -> list[Any]:
        """Return the place as JSON."""
        return [list(self.shape), str(self.dtype).removeprefix("torch."), self.start, self.numel, self.whole]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Place:
        """Return the place that ``to_json`` wrote."""
        shape, dtype, start, numel, whole = value
        return cls(tuple(shape), getattr(torch, dtype), start, numel, whole)


def exchange(mine: Mapping[str, Place], communicator: Communicator, label: str) -> dict[str, list[Place | None]]:
    """Tell the data ranks what each holds; a collective.

    Args:
        mine: places of this rank's slices by key; a rank that holds nothing of one may leave it out.
        communicator: connects the ranks.
        label: what it is for, for people.

    Returns:
        For each key that some rank has, each rank's place, in order of index; None where it has none.
    """
    told = {key: place.to_json() for key, place in mine.items()}
    every = communicator.gather_json(told, "data", label=label)
    keys = dict.fromkeys(key for one in every for key in one)
    return {key: [Place.from_json(one[key]) if key in one else None for one in every] for key in keys}


def shares(places: Sequence[Place | None], name: str) -> list[tuple[int, int]]:
    """Return the elements ``start, stop`` that each rank gives: together the whole tensor, each element once.

    Raises:
        ShardingError: the ranks' slices are of different tensors, or leave some of it out.
    """
    present = [place for place in places if place is not None]
    kinds = {(place.shape, place.dtype, place.whole) for place in present}
    if len(kinds) != 1 or not present[0].whole:
        raise ShardingError(
            f"the slices of {name} cannot be put together",
            expected="slices of one whole tensor on all data ranks",
            found=", ".join(sorted(f"shape {s} of {d}{'' if w else ', a block'}" for s, d, w in kinds)),
            remedy="a fault of the optimizer wrapper: report it to the plugin's author",
        )
    total = math.prod(present[0].shape)
    given, done = [(0, 0)] * len(places), 0
    filled = [(place, rank) for rank, place in enumerate(places) if place is not None and place.numel]
    for place, rank in sorted(filled, key=lambda pair: (pair[0].start, -pair[0].numel)):
        stop = place.start + place.numel
        if place.start <= done < stop:
            given[rank] = (done, stop)
            done = stop
    if done != total:
        raise ShardingError(
            f"no data rank holds element {done} of {name}",
            expected=f"{total} elements",
            found=str([None if place is None else (place.start, place.start + place.numel) for place in places]),
            remedy="a fault of the optimizer wrapper: report it to the plugin's author",
        )
    return given


def assemble(
    piece: TensorSlice | None,
    places: Sequence[Place | None],
    communicator: Communicator,
    name: str,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return a whole tensor of its own memory on every data rank, bit by bit what the slices hold.

    One collective that needs no memory but the result's, and none where every rank holds everything.

    Args:
        piece: this rank's slice; None where it holds nothing.
        places: every rank's, from ``exchange``.
        communicator: connects the ranks; the result lies on its device.
        name: the tensor's, for people.
        dtype: what to convert to; the slices travel in it. None: as they are.
    """
    given = shares(places, name)
    first = next(place for place in places if place is not None)
    total = math.prod(first.shape)
    whole = torch.zeros(total, dtype=dtype or first.dtype, device=communicator.device)
    replicated = all(place is not None and place.numel == total for place in places)
    start, stop = (0, total) if replicated else given[communicator.index("data")]
    if piece is not None and start < stop:
        whole[start:stop].copy_(piece.tensor.view(-1)[start - piece.start : stop - piece.start])
    givers = [rank for rank, (low, high) in enumerate(given) if low < high]
    if not replicated and len(givers) == 1:
        communicator.broadcast(bits(whole), givers[0], label=f"all of {name}").wait()
    elif not replicated:
        communicator.all_reduce(bits(whole), label=f"all of {name}").wait()
    return whole.view(first.shape)
