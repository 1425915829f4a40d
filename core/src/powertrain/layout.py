"""Flat layouts of parameters, and flat slices seen as N-d boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import attrs

Shape = tuple[int, ...]


@attrs.frozen
class Box:
    """An axis-aligned block of an N-d tensor.

    Attributes:
        offsets: the block's first index along each axis.
        sizes: the block's extent along each axis.
    """

    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        """The number of elements inside."""
        return math.prod(self.sizes)


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut the elements ``start..stop`` of a row-major tensor into boxes, in flat order.

    At most ``2 * ndim - 1`` boxes are needed: a ragged head and tail per axis
    around one whole middle. Each box is contiguous in the flat slice, so the
    boxes' elements concatenated are the slice.

    Raises:
        ValueError: the slice leaves the tensor.
    """
    shape = tuple(shape)
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"slice {start}:{stop} leaves a tensor of shape {shape}")
    if start == stop:
        return []
    return list(_cut(shape, start, stop, ()))


def _cut(shape: Shape, start: int, stop: int, prefix: Shape) -> Iterator[Box]:
    """Yield the boxes of a slice of the sub-tensor at index ``prefix``."""
    lead = (1,) * len(prefix)
    if not shape:
        yield Box(prefix, lead)
        return
    if len(shape) == 1:
        yield Box((*prefix, start), (*lead, stop - start))
        return
    row = math.prod(shape[1:])
    first, skipped = divmod(start, row)
    last, kept = divmod(stop, row)
    if first == last:
        yield from _cut(shape[1:], skipped, kept, (*prefix, first))
        return
    if skipped:
        yield from _cut(shape[1:], skipped, row, (*prefix, first))
        first += 1
    if first < last:
        yield Box((*prefix, first, *(0 for _ in shape[1:])), (*lead, last - first, *shape[1:]))
    if kept:
        yield from _cut(shape[1:], 0, kept, (*prefix, last))


@attrs.frozen
class FlatEntry:
    """Where one tensor lies in a flat buffer.

    Attributes:
        name: the tensor's global name.
        shape: its shape.
        start: its first element in the buffer.
    """

    name: str
    shape: Shape
    start: int

    @property
    def stop(self) -> int:
        """One past its last element in the buffer."""
        return self.start + math.prod(self.shape)


@attrs.frozen
class FlatLayout:
    """Tensors laid one after the other in one flat buffer.

    Attributes:
        entries: the tensors, in order.
        numel: the buffer's length in elements, padding included.
    """

    entries: tuple[FlatEntry, ...]
    numel: int

    @classmethod
    def build(cls, tensors: Sequence[tuple[str, Sequence[int]]], *, align: int = 1, multiple: int = 1) -> FlatLayout:
        """Lay out ``(name, shape)`` pairs.

        Args:
            tensors: the tensors, in order.
            align: each tensor starts at a multiple of this many elements.
            multiple: the buffer's length is rounded up to a multiple of this.
        """
        entries, end = [], 0
        for name, shape in tensors:
            start = -(-end // align) * align
            entries.append(FlatEntry(name, tuple(shape), start))
            end = entries[-1].stop
        return cls(tuple(entries), -(-end // multiple) * multiple)
