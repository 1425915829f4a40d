"""Flat slices as boxes: exact, few, in order, at any shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from powertrain.layout import Box, FlatLayout, boxes
from powertrain.roles.checkpoint import TensorSlice

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def slices(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """Draw a shape and a flat slice of it."""
    shape = draw(shapes)
    numel = math.prod(shape)
    start = draw(st.integers(0, numel))
    return shape, start, draw(st.integers(start, numel))


def inside(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """Return the elements of a box."""
    index = tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))
    return tensor[index]


@given(slices())
def test_boxes_concatenated_are_the_slice(case: tuple[tuple[int, ...], int, int]) -> None:
    """Laid one after the other, the boxes' elements are the flat slice, in order and each once."""
    shape, start, stop = case
    tensor = torch.arange(math.prod(shape)).view(shape)
    pieces = [inside(tensor, box).reshape(-1) for box in boxes(shape, start, stop)]
    together = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    assert together.tolist() == list(range(start, stop))


@given(slices())
def test_boxes_are_few_and_lie_within(case: tuple[tuple[int, ...], int, int]) -> None:
    """There are at most 2 ndim - 1 boxes, none is empty, and none leaves the tensor."""
    shape, start, stop = case
    found = boxes(shape, start, stop)
    assert len(found) <= max(1, 2 * len(shape) - 1)
    for box in found:
        assert len(box.offsets) == len(box.sizes) == len(shape)
        assert box.numel > 0
        assert all(a >= 0 and a + n <= size for a, n, size in zip(box.offsets, box.sizes, shape, strict=True))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 13)])
def test_a_slice_that_leaves_its_tensor_is_refused(start: int, stop: int) -> None:
    """A slice outside the tensor, or backwards, is a ValueError that shows both."""
    with pytest.raises(ValueError, match=rf"slice {start}:{stop} leaves a tensor of shape \(3, 4\)"):
        boxes((3, 4), start, stop)


def test_a_number_is_one_box() -> None:
    """A tensor without dimensions is a box without dimensions."""
    assert boxes((), 0, 1) == [Box((), ())]
    assert boxes((), 0, 0) == []


@given(slices())
def test_chunks_are_views_of_the_slice(case: tuple[tuple[int, ...], int, int]) -> None:
    """Writing into the chunks of a TensorSlice fills its tensor with the right elements."""
    shape, start, stop = case
    whole = torch.arange(math.prod(shape)).view(shape)
    piece = TensorSlice("x", shape, torch.full((stop - start,), -1), start)
    for box, chunk in piece.chunks():
        assert chunk.shape == box.sizes
        chunk.copy_(inside(whole, box))
    assert piece.tensor.tolist() == list(range(start, stop))


@given(slices(), st.data())
def test_chunks_of_a_block_lie_in_the_global_tensor(
    case: tuple[tuple[int, ...], int, int], data: st.DataObject
) -> None:
    """A flat slice counted within a block comes out as boxes of the global tensor."""
    sizes, start, stop = case
    offsets = tuple(data.draw(st.integers(0, 3)) for _ in sizes)
    shape = tuple(a + n + data.draw(st.integers(0, 2)) for a, n in zip(offsets, sizes, strict=True))
    whole = torch.arange(math.prod(shape)).view(shape)
    flat = inside(whole, Box(offsets, sizes)).reshape(-1)
    piece = TensorSlice("x", shape, flat[start:stop].clone(), start, Box(offsets, sizes))
    for box, chunk in piece.chunks():
        assert torch.equal(chunk, inside(whole, box))


@given(
    st.lists(shapes, max_size=6),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_flat_layouts_align_and_round_up(given_shapes: list[tuple[int, ...]], align: int, multiple: int) -> None:
    """Tensors lie in order without overlap, at multiples of ``align``, and the buffer ends at one of ``multiple``."""
    layout = FlatLayout.build([(f"t{i}", s) for i, s in enumerate(given_shapes)], align=align, multiple=multiple)
    end = 0
    for entry, shape in zip(layout.entries, given_shapes, strict=True):
        assert entry.start % align == 0
        assert end <= entry.start < end + align
        assert entry.stop - entry.start == math.prod(shape)
        end = entry.stop
    assert layout.numel % multiple == 0
    assert end <= layout.numel < end + multiple
