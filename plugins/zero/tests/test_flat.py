"""Flat layouts: shards of parameters, whole or cut."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

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
