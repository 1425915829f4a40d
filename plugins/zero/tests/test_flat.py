"""Flat layouts: shards of parameters, whole or cut."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from powertrain_zero.chunk import Segment
from powertrain_zero.flat import ALIGN, flat_layout

shapes = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=8)


def named(shapes: list[tuple[int, ...]]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"p{i}", torch.nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes)]


@given(shapes, st.integers(1, 5), st.booleans())
def test_parameters_have_places_of_their_own(shapes: list[tuple[int, ...]], shards: int, whole: bool) -> None:
    """Entries keep order, names and shapes, start aligned, overlap nowhere and lie inside equal shards."""
    layout = flat_layout(named(shapes), shards, whole_tensors=whole)
    assert [entry.name for entry in layout.entries] == [f"p{i}" for i in range(len(shapes))]
    assert [entry.shape for entry in layout.entries] == shapes
    assert layout.numel % (shards * ALIGN) == 0
    places = sorted((entry.start, entry.stop) for entry in layout.entries)
    assert all(start % ALIGN == 0 for start, _ in places)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(places))
    assert places[-1][1] <= layout.numel


@given(shapes, st.integers(2, 5))
def test_whole_tensors_lie_in_one_shard(shapes: list[tuple[int, ...]], shards: int) -> None:
    """Asked for whole tensors, no parameter crosses the border of a shard, and no shard is fuller than it must be."""
    layout = flat_layout(named(shapes), shards, whole_tensors=True)
    length = layout.numel // shards
    for entry in layout.entries:
        assert entry.start // length == (entry.stop - 1) // length
    rounded = [-(-math.prod(shape) // ALIGN) * ALIGN for shape in shapes]
    assert length <= max(max(rounded), -(-sum(rounded) // shards)) + max(rounded)


@given(shapes, st.integers(1, 5), st.sampled_from([16, 256, 48]))
def test_pieces_begin_where_blocks_end(shapes: list[tuple[int, ...]], shards: int, block: int) -> None:
    """With a larger alignment, each parameter is cut at multiples of it, counted from the parameter's start."""
    align = math.lcm(ALIGN, block)
    layout = flat_layout(named(shapes), shards, multiple=align, align=align)
    length = layout.numel // shards
    for entry in layout.entries:
        for border in range(0, layout.numel, length):
            if entry.start < border < entry.stop:
                assert (border - entry.start) % block == 0


def test_units_take_turns_with_the_largest() -> None:
    """Units of one shape, dealt out from another slice each, give every rank as much: in memory and in work."""
    sizes = [(4, 8), (4, 4), (2, 2)]
    held = [0] * 4
    for turn in range(4):
        layout = flat_layout(named(sizes), 4, whole_tensors=True, turn=turn)
        for entry in layout.entries:
            held[entry.start // (layout.numel // 4)] += math.prod(entry.shape)
    assert held == [52] * 4


def segment(start: int, numel: int, shape: tuple[int, ...]) -> Segment:
    """Return a piece of a parameter."""
    return Segment(0, "p", shape, start, 0, torch.nn.Parameter(torch.zeros(numel)))


def test_state_by_the_block_is_a_slice_of_the_whole() -> None:
    """One number for each 16 elements: a piece holds those of its elements, wherever it was cut, the last one short."""
    whole = torch.arange(7.0)  # 100 elements
    first, last = segment(0, 64, (10, 10)), segment(64, 36, (10, 10))
    parts = [piece.share("scale", whole, torch.bfloat16, {}, 16) for piece in (first, last)]
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6]]
    assert all(part.dtype == torch.float32 for part in parts), "a scale is as exact as it was"
    slices = [piece.slice("x", part, 16) for piece, part in zip((first, last), parts, strict=True)]
    assert [(piece.shape, piece.start, piece.tensor.tolist()) for piece in slices] == [
        ((7,), 0, [0, 1, 2, 3]), ((7,), 4, [4, 5, 6])
    ]  # fmt: skip
    single = segment(0, 1, (1,))
    assert single.slice("x", torch.ones(1), 16).shape == (1,)
