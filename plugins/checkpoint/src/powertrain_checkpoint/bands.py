"""From slices that are to be filled to ranges of files, each with what is done with its bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import attrs
import torch

from powertrain.roles.checkpoint import Loan, TensorSlice
from powertrain.roles.communicator import Handle
from powertrain_checkpoint.dtypes import SIZES, to_torch
from powertrain_checkpoint.manifest import BLOCK, Chunk, Manifest, Tensor
from powertrain_checkpoint.memory import address_of, bytes_of, move, raw
from powertrain_checkpoint.planning import Copy, ReadPlanner

LENGTH = BLOCK
"""Bytes of a chunk that are one band where they lie in one piece, in the file and in the target."""

SPAN = 4 * BLOCK
"""Bytes of a chunk that a band of rows spans at most, gaps included."""

_LENT = 4 * BLOCK
"""Bytes of memory that are lent at a time for what rests elsewhere."""

Check = tuple[int, int, int]
"""A range of a file, from its first byte to after its last, and its CRC-32."""


class Lent:
    """A slice that rests elsewhere: its memory is lent when the first band comes, and stored after the last.

    Args:
        piece: the slice.
    """

    def __init__(self, piece: TensorSlice) -> None:
        self._piece = piece
        self._loan: Loan | None = None
        self._boxes: list[torch.Tensor] = []
        self.left = 0
        """Bands that are still to come."""

    def box(self, index: int) -> torch.Tensor:
        """Return the memory of one of the slice's boxes."""
        if self._loan is None:
            self._loan = self._piece.lend(blank=True)
            here = attrs.evolve(self._piece, tensor=self._loan.wait(), slot=None)
            self._boxes = [tensor for _, tensor in here.chunks()]
        return self._boxes[index]

    def filled(self) -> Handle | None:
        """Count one band; after the last, start to store."""
        self.left -= 1
        if self.left or self._loan is None:
            return None
        loan, self._loan, self._boxes = self._loan, None, []
        return loan.store()

    def release(self) -> None:
        """End a loan that was not filled."""
        loan, self._loan, self._boxes = self._loan, None, []
        if loan is not None:
            loan.release()


@attrs.frozen(eq=False)
class Band:
    """A range of a file, and where its elements go.

    Attributes:
        file: which of the manifest's.
        start: the first byte.
        stop: after the last.
        checks: the blocks that the range touches.
        dtype: a safetensors code.
        extent: how many elements there are along each axis.
        strides: their distances, in elements, within the range.
        target: returns where they go, of this extent.
        lent: what the target is a part of, if that rests elsewhere.
        on_host: whether the target lies in the host's memory.
    """

    file: int
    start: int
    stop: int
    checks: tuple[Check, ...]
    dtype: str = "U8"
    extent: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    target: Callable[[], torch.Tensor] | None = None
    lent: Lent | None = None
    on_host: bool = True

    def deliver(self, view: memoryview) -> None:
        """Copy the elements to their target, converting their type; ``view`` has the bytes of the range."""
        if self.target is None:
            return
        target = self.target()
        found = torch.frombuffer(view, dtype=to_torch(self.dtype))
        if len(self.extent) == 1 and target.is_contiguous() and (target.dtype, target.device) == (
            found.dtype, found.device,
        ):  # fmt: skip
            move(address_of(view), bytes_of(raw(target)))
        else:
            target.copy_(found.as_strided(self.extent, self.strides))


class Bands:
    """Finds what slices need of a checkpoint.

    Args:
        manifest: of it.
        planner: knows its chunks.
    """

    def __init__(self, manifest: Manifest, planner: ReadPlanner) -> None:
        self._manifest, self._planner = manifest, planner

    def of(self, slices: Sequence[TensorSlice]) -> list[Band]:
        """Return bands in the order in which they are best read: by file and place, but one loan after the other."""
        groups: list[list[Band]] = []
        for item in slices:
            if item.slot is None:
                groups += ([band] for band in self._of(item, None))
            else:
                groups += (self._of(piece, Lent(piece)) for piece in self._pieces(item))
        groups = [sorted(group, key=_place) for group in groups if group]
        heads = {band.file: self._head(band.file) for group in groups for band in group}
        rest = [band for group in sorted(groups, key=lambda group: _place(group[0])) for band in group]
        return [*(heads[file] for file in sorted(heads)), *rest]

    def _head(self, index: int) -> Band:
        file = self._manifest.files[index]
        return Band(index, 0, file.header_size, ((0, file.header_size, file.header_checksum),))

    def _of(self, item: TensorSlice, lent: Lent | None) -> list[Band]:
        tensor = self._manifest.tensors[item.name]
        chunks = item.chunks()
        result: list[Band] = []
        for copy in self._planner.plan(item.name, tensor, [box for box, _ in chunks]):
            result += _cut(tensor, copy, chunks[copy.target][1], lent)
        if lent is not None:
            lent.left = len(result)
        return result

    def _pieces(self, item: TensorSlice) -> Iterator[TensorSlice]:
        """Cut a slice that rests elsewhere into pieces that are lent one by one."""
        tensor = self._manifest.tensors[item.name]
        size = SIZES[tensor.dtype]
        count = item.tensor.numel()
        step = _LENT // max(size, item.tensor.element_size())
        # Where a piece ends a block of the file should end, or both pieces would read it.
        first = step
        chunks = item.chunks()
        copies = self._planner.plan(item.name, tensor, [box for box, _ in chunks])
        if count > step and copies:
            largest = max(copies, key=lambda copy: math.prod(copy.lengths))
            here = sum(box.numel for box, _ in chunks[: largest.target])
            here += _flat(largest.destination, chunks[largest.target][0].sizes)
            there = _flat(largest.source, tensor.chunks[largest.chunk].sizes)
            first = (here - there) % (BLOCK // size) or step
        start, stop = 0, first
        while start < count:
            yield item.narrow(start, min(stop, count))
            start, stop = stop, stop + step


def _place(band: Band) -> tuple[int, int]:
    return band.file, band.start


def _flat(index: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(i * math.prod(sizes[axis + 1 :]) for axis, i in enumerate(index))


def _cut(tensor: Tensor, copy: Copy, box: torch.Tensor, lent: Lent | None) -> Iterator[Band]:
    """Cut one copy into bands."""
    chunk, size = tensor.chunks[copy.chunk], SIZES[tensor.dtype]
    strides = tuple(math.prod(chunk.sizes[axis + 1 :]) for axis in range(len(chunk.sizes)))
    first = _flat(copy.source, chunk.sizes)
    part = _narrow(box, copy.destination, copy.lengths)
    span = _span(copy.lengths, strides)

    def band(
        low: int,
        count: int,
        extent: tuple[int, ...],
        steps: tuple[int, ...],
        pick: Callable[[torch.Tensor], torch.Tensor],
    ) -> Band:
        def target() -> torch.Tensor:
            whole = part if lent is None else _narrow(lent.box(copy.target), copy.destination, copy.lengths)
            return pick(whole)

        start, stop = low * size, (low + count) * size
        return Band(
            chunk.file, chunk.start + start, chunk.start + stop, _checks(chunk, size, start, stop),
            tensor.dtype, extent, steps, target, lent, lent is None and box.device.type == "cpu",
        )  # fmt: skip

    if span == math.prod(copy.lengths) and part.is_contiguous():
        low = first
        while low < first + span:  # up to multiples of LENGTH in the chunk, where blocks end
            high = min((low * size // LENGTH + 1) * LENGTH // size, first + span)
            yield band(low, high - low, (high - low,), (1,), _Flat(low - first, high - first))
            low = high
        return
    for start, extent in _rows(copy.lengths, strides, SPAN // size):
        low = first + sum(a * stride for a, stride in zip(start, strides, strict=True))
        yield band(low, _span(extent, strides), extent, strides, _Box(start, extent))


@attrs.frozen
class _Flat:
    """Picks elements of a contiguous tensor."""

    start: int
    stop: int

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1)[self.start : self.stop]


@attrs.frozen
class _Box:
    """Picks a block of a tensor."""

    start: tuple[int, ...]
    extent: tuple[int, ...]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return _narrow(tensor, self.start, self.extent)


def _checks(chunk: Chunk, size: int, start: int, stop: int) -> tuple[Check, ...]:
    """Return the blocks that bytes ``start`` to ``stop`` of a chunk touch."""
    length = math.prod(chunk.sizes) * size
    return tuple(
        (chunk.start + number * BLOCK, chunk.start + min((number + 1) * BLOCK, length), chunk.checksums[number])
        for number in range(start // BLOCK, -(-stop // BLOCK))
    )


def _narrow(tensor: torch.Tensor, start: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for axis, (first, length) in enumerate(zip(start, lengths, strict=True)):
        tensor = tensor.narrow(axis, first, length)
    return tensor


def _span(lengths: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(lengths, strides, strict=True))


def _rows(
    lengths: tuple[int, ...], strides: Sequence[int], limit: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a part into (start, extent) pieces, each spanning at most ``limit`` elements of its chunk."""
    start = (0,) * len(lengths)
    if _span(lengths, strides) <= limit:
        yield start, lengths
        return
    # The first axis with more than one index: a piece of it spans the least.
    axis = next(i for i, n in enumerate(lengths) if n > 1)
    tail = _span(lengths[axis + 1 :], strides[axis + 1 :])
    rows = max(1, (limit - tail) // strides[axis] + 1)
    for first in range(0, lengths[axis], rows):
        extent = (*lengths[:axis], min(rows, lengths[axis] - first), *lengths[axis + 1 :])
        for inner, size in _rows(extent, strides, limit):
            yield tuple(a + (first if i == axis else 0) for i, a in enumerate(inner)), size
