"""Batches: any nest of tensors, split along dimension 0."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from powertrain import nest
from powertrain.errors import BatchError

Pair = namedtuple("Pair", ["x", "y"])


class Output(OrderedDict):
    """A mapping of a model library, with attributes."""


def leaf(samples: int) -> torch.Tensor:
    return torch.arange(samples * 2).view(samples, 2)


def nests(samples: int) -> st.SearchStrategy[object]:
    """Draw nests of tensors with so many samples, numbers and texts."""
    leaves = st.one_of(
        st.builds(lambda: leaf(samples)), st.just("text"), st.just(3), st.just(None), st.just(torch.tensor(1.0))
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        ),
        max_leaves=6,
    ).map(lambda rest: {"first": leaf(samples), "rest": rest})


@given(st.data(), st.integers(1, 7), st.integers(1, 7))
def test_pieces_joined_are_the_batch(data: st.DataObject, samples: int, size: int) -> None:
    """Whatever the nest, the pieces have its shape, and their tensors joined are its tensors."""
    batch = data.draw(nests(samples))
    pieces = list(nest.split(batch, size))
    assert [nest.samples(piece) for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
    assert sum(nest.samples(piece) for piece in pieces) == samples
    for whole, *parts in zip(nest.leaves(batch), *(nest.leaves(piece) for piece in pieces), strict=True):
        if isinstance(whole, torch.Tensor) and whole.ndim:
            assert torch.equal(torch.cat(parts), whole)
        else:
            assert all(part is whole for part in parts)


@pytest.mark.parametrize("kind", [list, tuple, lambda items: Pair(*items)])
def test_sequences_keep_their_class(kind: object) -> None:
    """Lists, tuples and named tuples come back as what they were."""
    batch = kind([leaf(2), leaf(2)])  # type: ignore[operator]
    mapped = nest.map_tensors(lambda t: t + 1, batch)
    assert type(mapped) is type(batch)
    assert torch.equal(mapped[1], leaf(2) + 1)


def test_mappings_keep_their_class_and_the_original() -> None:
    """A subclass of dict stays one, and the given nest is not changed."""
    batch = Output(x=leaf(2))
    mapped = nest.map_tensors(lambda t: t + 1, batch)
    assert type(mapped) is Output
    assert torch.equal(batch["x"], leaf(2))
    assert torch.equal(mapped["x"], leaf(2) + 1)


def test_place_converts_floating_point_only() -> None:
    """Floating-point tensors take the given format; integers and booleans keep theirs."""
    batch = {"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64), "mask": torch.ones(2, dtype=torch.bool)}
    placed = nest.place(batch, torch.device("cpu"), torch.bfloat16)
    assert [placed[k].dtype for k in ("x", "ids", "mask")] == [torch.bfloat16, torch.int64, torch.bool]
    assert nest.place(batch, torch.device("cpu"), None)["x"].dtype == torch.float32


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"a": "text"}, "holds no tensor with a dimension to split"),
        ([], "holds no tensor with a dimension to split"),
        (torch.tensor(3.0), "holds no tensor with a dimension to split"),
        ((leaf(2), leaf(3)), "differ in their number of samples"),
        (leaf(0), "the batch is empty"),
    ],
)
def test_batches_that_cannot_be_counted_are_refused(batch: object, says: str) -> None:
    """No tensor, tensors that differ and empty ones are a BatchError each."""
    with pytest.raises(BatchError, match=says) as caught:
        nest.samples(batch)
    assert caught.value.code == "PT400"


def test_the_error_lists_the_sizes() -> None:
    """Where tensors differ, every size is shown."""
    with pytest.raises(BatchError) as caught:
        nest.samples({"x": leaf(4), "y": [leaf(2), leaf(4)]})
    assert caught.value.found == "2, 4"
