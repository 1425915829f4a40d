"""The computed shuffle."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powertrain_data.permutation import Permutation

lengths = st.integers(1, 5000)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 10**6)


def order(length: int, seed: int, epoch: int = 0) -> list[int]:
    """Return the whole permutation."""
    return Permutation(length, seed, epoch)(np.arange(length)).tolist()


@given(lengths, seeds, epochs)
def test_every_number_comes_exactly_once(length: int, seed: int, epoch: int) -> None:
    """For any length, seed and epoch it is a bijection of ``range(length)``."""
    assert sorted(order(length, seed, epoch)) == list(range(length))


@given(lengths, seeds, epochs, st.data())
def test_any_part_is_the_part_of_the_whole(length: int, seed: int, epoch: int, data: st.DataObject) -> None:
    """A slice computed alone equals the slice of the whole, so ranks need not compute each other's."""
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    part = Permutation(length, seed, epoch)(np.arange(start, stop))
    assert part.dtype == np.int64
    assert part.tolist() == order(length, seed, epoch)[start:stop]


@pytest.mark.parametrize("length", [2**32 - 5, 10**12, 2**62])
def test_huge_datasets_cost_no_memory(length: int) -> None:
    """Positions of a dataset of any size are computed alone, distinct and in range."""
    positions = np.concatenate([np.arange(500), np.arange(length - 500, length)])
    chosen = Permutation(length, 1, 0)(positions)
    assert len(set(chosen.tolist())) == 1000
    assert 0 <= chosen.min() <= chosen.max() < length
    assert chosen.std() > 0.2 * length  # spread over the whole, not near where they lie


def test_the_order_is_fixed_for_good() -> None:
    """The same numbers on every machine and in every version: a checkpoint's position depends on them."""
    assert order(10, seed=0) == FIRST
    assert order(10, seed=0, epoch=1) == SECOND


FIRST = [2, 6, 9, 0, 3, 7, 4, 5, 1, 8]
SECOND = [2, 7, 3, 5, 8, 6, 4, 0, 9, 1]


@pytest.mark.parametrize("length", [2, 3, 4])
def test_all_orders_of_few_samples_occur_equally_often(length: int) -> None:
    """Over 4,000 epochs each order of a handful of samples comes about as often as any other."""
    counts = Counter(tuple(order(length, 3, epoch)) for epoch in range(4_000))
    assert set(counts) == set(itertools.permutations(range(length)))
    expected = 4_000 / math.factorial(length)
    freedom = math.factorial(length) - 1
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 8  # some four standard deviations above the mean


def test_each_sample_comes_at_each_position() -> None:
    """Over 4,000 epochs every sample takes every position about equally often."""
    table = np.zeros((20, 20))
    for epoch in range(4000):
        table[np.arange(20), order(20, 5, epoch)] += 1
    statistic = ((table - 200) ** 2 / 200).sum()
    assert statistic < 361 + 4 * math.sqrt(2 * 361)


@pytest.mark.parametrize("other", [(7, 1), (8, 0)], ids=["epoch", "seed"])
def test_neighbouring_epochs_and_seeds_are_unrelated(other: tuple[int, int]) -> None:
    """Orders of consecutive epochs or seeds correlate no more than chance, with each other and with the dataset."""
    first, second = order(10_000, 7, 0), order(10_000, *other)
    for left, right in ((first, second), (first, range(10_000)), (second, range(10_000))):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.04
        assert sum(a == b for a, b in zip(left, right, strict=True)) < 10


def test_neighbours_part() -> None:
    """Samples that lie side by side in the dataset do not stay side by side."""
    steps = np.diff(order(10_000, 7))
    assert (np.abs(steps) == 1).sum() < 20
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.05  # what independent uniform numbers give
