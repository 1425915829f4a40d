"""Reading plain weights: each rank reads the bytes of its own slices, and no others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from powertrain.errors import CheckpointMismatch
from powertrain.layout import Box
from powertrain.roles.checkpoint import CheckpointReader, TensorInfo, TensorSlice
from powertrain_checkpoint.dtypes import SIZES, to_torch
from powertrain_checkpoint.library import Library, Place, read_range

_PIECE = 16 * 2**20
"""Bytes read and converted at a time: what a read needs beside its target."""


class WeightsReader(CheckpointReader):
    """A library's weights under the names ``model/<name>``; ``read`` is local.

    Args:
        library: the files, whose headers were checked.
    """

    def __init__(self, library: Library) -> None:
        self.tag = library.name
        self.values = {}
        self.rank_values = ()
        self._places = {f"model/{name}": place for name, place in library.places.items()}
        self.tensors = {name: TensorInfo(place.shape, to_torch(place.dtype)) for name, place in self._places.items()}

    def read(self, slices: Sequence[TensorSlice]) -> None:
        """Fill the slices in place, converting element types.

        Raises:
            CheckpointMismatch: a name or shape is not in the files; nothing was read.
            ShardTruncated: a file has become shorter since it was opened.
        """
        for item in slices:
            info = self.tensors.get(item.name)
            if info is None or info.shape != tuple(item.shape):
                raise CheckpointMismatch(
                    f"{self.tag} does not hold {item.name} of shape {list(item.shape)}",
                    found="no such name" if info is None else f"shape {list(info.shape)}",
                )
        for item in sorted(slices, key=self._order):
            place = self._places[item.name]
            if item.tensor.numel() == 0:
                continue
            descriptor = os.open(place.file, os.O_RDONLY)
            try:
                for start, target in _runs(item):
                    _fill(descriptor, place, start, target)
            finally:
                os.close(descriptor)

    def _order(self, item: TensorSlice) -> tuple[str, int, int]:
        place = self._places[item.name]
        return str(place.file), place.start, item.start


def _runs(item: TensorSlice) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the parts of a slice that lie in one piece in the file: the first element's number, and the target."""
    if item.block is None:  # the whole of it: files are row-major, as slices are
        yield item.start, item.tensor.view(-1)
        return
    strides = _strides(item.shape)
    for box, target in item.chunks():
        yield from _box(box, target, item.shape, strides, sum(a * b for a, b in zip(box.offsets, strides, strict=True)))


def _box(
    box: Box, target: torch.Tensor, shape: Sequence[int], strides: Sequence[int], first: int, axis: int = 0
) -> Iterator[tuple[int, torch.Tensor]]:
    # Whole rows after this axis: what the box holds of it is one run.
    if axis >= len(shape) - 1 or tuple(box.sizes[axis + 1 :]) == tuple(shape[axis + 1 :]):
        yield first, target.reshape(-1)
        return
    for index in range(box.sizes[axis]):
        yield from _box(box, target[index], shape, strides, first + index * strides[axis], axis + 1)


def _strides(shape: Sequence[int]) -> list[int]:
    result = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        result[axis - 1] = result[axis] * shape[axis]
    return result


def _fill(descriptor: int, place: Place, start: int, target: torch.Tensor) -> None:
    """Read ``target``'s elements from the ``start``-th of a tensor."""
    size = SIZES[place.dtype]
    buffer = bytearray(min(_PIECE, target.numel() * size))
    limit = len(buffer) // size
    for done in range(0, target.numel(), limit):
        count = min(limit, target.numel() - done)
        with memoryview(buffer)[: count * size] as view:
            read_range(descriptor, place, (start + done) * size, view)
        target[done : done + count].copy_(torch.frombuffer(buffer, dtype=to_torch(place.dtype), count=count))
