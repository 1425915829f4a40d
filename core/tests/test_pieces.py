"""Slices put together, and whole tensors lent as slices."""

from __future__ import annotations

import pytest
import torch

from powertrain.errors import ShardingError
from powertrain.pieces import FlatViews, Place, assemble, shares
from powertrain.roles.checkpoint import TensorSlice
from powertrain.testing.loopback import LoopbackWorld
from powertrain.testing.scattered import same


def places(*slices, shape=(4,)):
    return [None if s is None else Place(shape, torch.float32, s[0], s[1] - s[0], True) for s in slices]


def test_shares_are_disjoint_and_whole():
    """Slices that repeat or overlap give each element once; the first of equals gives it."""
    assert shares(places((0, 2), (2, 4)), "x") == [(0, 2), (2, 4)]
    assert shares(places((2, 4), (0, 2), (0, 2)), "x") == [(2, 4), (0, 2), (0, 0)]
    assert shares(places((0, 3), (1, 4), None), "x") == [(0, 3), (3, 4), (0, 0)]
    assert shares(places((4, 4), (0, 4), (0, 4)), "x") == [(0, 0), (0, 4), (0, 0)]
    assert shares(places(None, (0, 0), shape=(0, 3)), "x") == [(0, 0), (0, 0)]


@pytest.mark.parametrize("holes", [[(0, 1), (2, 4)], [(0, 3), None], [(1, 4), (1, 4)]])
def test_holes_are_errors(holes):
    """Elements that no rank holds are an error that names the first of them."""
    with pytest.raises(ShardingError, match=r"no data rank holds element [013] of x"):
        shares(places(*holes), "x")


def test_slices_of_different_tensors_are_errors():
    """Ranks that disagree on shape or type, or hold slices of blocks, are an error."""
    with pytest.raises(ShardingError, match="cannot be put together"):
        shares([*places((0, 4)), *places((0, 2), shape=(2,))], "x")
    with pytest.raises(ShardingError, match="cannot be put together"):
        shares([Place((4,), torch.float32, 0, 4, False)], "x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_any_type_is_put_together(dtype):
    """Every element type comes out bit by bit, through one collective."""
    true = (torch.arange(11) % 2).to(dtype) if dtype == torch.bool else (torch.arange(11) - 4).to(dtype)

    def run(communicator):
        start, stop = [(7, 11), (0, 7)][communicator.rank]
        known = [Place((11,), dtype, 7, 4, True), Place((11,), dtype, 0, 7, True)]
        piece = TensorSlice("x", (11,), true[start:stop].clone(), start)
        assert same(assemble(piece, known, communicator, "x"), true)

    LoopbackWorld(2).run(run)


def test_other_memory_formats_are_lent_as_copies():
    """Writes into a copy come home with ``put_back``; an unwritten copy follows the tensor."""
    tensor = torch.arange(6.0).view(2, 3).t()
    views = FlatViews()
    first = views.lend("x", tensor).tensor
    assert first.tolist() == [0, 3, 1, 4, 2, 5]
    tensor[0, 0] = 7
    assert views.lend("x", tensor).tensor.tolist() == [7, 3, 1, 4, 2, 5]
    views.lend("x", tensor).tensor[1] = 8
    assert views.lend("x", tensor).tensor[1] == 8
    views.put_back()
    assert tensor[0].tolist() == [7, 8]
    tensor[0, 0] = 1
    views.put_back()
    assert tensor[0].tolist() == [1, 8]
