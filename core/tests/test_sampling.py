"""The default sampler and the loader: each sample once, and the exact position."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from powertrain.config.batch import BatchSizes
from powertrain.errors import DataError
from powertrain.sampling import EpochSampler, Loader


def sampler(length: int, total: int, rank: int = 0, size: int = 1, seed: int = 0) -> EpochSampler:
    sizes = BatchSizes(micro=total // size, accumulation=1, total=total, origins={})
    return EpochSampler(length, sizes, rank, size, seed)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 3), st.integers(0, 40))
def test_an_epoch_is_every_sample_once(ranks: int, local: int, seed: int, extra: int) -> None:
    """Over any number of ranks the samples of an epoch are distinct, and less than a global batch is left out."""
    total = ranks * local
    length = total + extra
    seen = [i for rank in range(ranks) for batch in sampler(length, total, rank, ranks, seed) for i in batch]
    assert len(set(seen)) == len(seen) == length // total * total
    assert set(seen) <= set(range(length))


@given(st.integers(0, 30), st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 3, 4, 6]))
def test_resuming_on_other_ranks_sees_the_same_batches(taken: int, before: int, after: int) -> None:
    """Wherever it stops, another number of ranks goes on with the same global batches."""
    old = [sampler(103, 12, rank, before) for rank in range(before)]
    for one in old:
        for _ in range(taken):
            one.advance()
    new = [sampler(103, 12, rank, after) for rank in range(after)]
    for one in new:
        one.load_state(json.loads(json.dumps(old[0].state())))

    def batches(world: list[EpochSampler]) -> list[list[int]]:
        return [[i for piece in pieces for i in piece] for pieces in zip(*world, strict=True)]

    assert batches(new) == batches(old)


def test_epochs_and_seeds_give_other_orders() -> None:
    """Each epoch, and each seed, shuffles anew; the same ones give the same order."""
    one = sampler(64, 4, seed=1)
    first = list(one)
    assert list(sampler(64, 4, seed=1)) == first
    assert list(sampler(64, 4, seed=2)) != first
    for _ in range(len(one)):
        one.advance()
    assert one.epoch == 1
    assert list(one) != first


def test_a_larger_batch_begins_the_next_epoch() -> None:
    """A rest that fills no batch of the resumed run is left out, so that iteration does not come up empty."""
    old = sampler(50, 4)
    for _ in range(11):
        old.advance()
    new = sampler(50, 8)
    new.load_state(old.state())
    assert (new.epoch, new.consumed) == (1, 0)
    assert len(list(new)) == 6


def test_too_few_samples_are_refused() -> None:
    """A dataset shorter than one global batch is a DataError with the arithmetic."""
    sizes = BatchSizes(micro=2, accumulation=3, total=12, origins={})
    with pytest.raises(DataError, match="has 11 samples, fewer than one global batch") as caught:
        EpochSampler(11, sizes, 0, 2, 0)
    assert caught.value.code == "PT410"
    assert caught.value.expected == "at least 12 = micro 2 x accumulation 3 x 2 data ranks"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"length": 99}, ["its length differs", "length = 99", "use the dataset of the checkpoint"]),
        ({"seed": 7}, ["its seed differs", "seed = 7", "set `[run] seed = 7`"]),
        ({"kind": "shuffled"}, ["another sampler wrote it", "kind = shuffled", "kind = epoch"]),
        ({"kind": None}, ["another sampler wrote it"]),
    ],
)
def test_positions_of_another_order_are_refused(change: dict[str, object], says: list[str]) -> None:
    """A position of another dataset, seed or kind of sampler is a DataError, and nothing changes."""
    one = sampler(50, 4)
    one.advance()
    with pytest.raises(DataError) as caught:
        one.load_state({**one.state(), "consumed": 20, **change})
    assert all(text in str(caught.value) for text in says)
    assert one.consumed == 4


def test_the_loader_hands_out_the_samplers_batches() -> None:
    """Batches are the dataset's samples in the sampler's order, collated."""
    data = TensorDataset(torch.arange(20))
    order = list(sampler(20, 4))
    loader = Loader(data, sampler(20, 4), None)
    assert [batch[0].tolist() for batch in loader] == order
    assert len(loader) == 5


def test_the_loaders_position_is_what_was_handed_out() -> None:
    """Leaving the loop after a batch resumes with the next one, and the end begins a new epoch."""
    data = TensorDataset(torch.arange(20))
    order = list(sampler(20, 4))
    loader = Loader(data, sampler(20, 4), lambda items: torch.stack([item[0] for item in items]))
    seen = []
    for batch in loader:
        seen.append(batch.tolist())
        if len(seen) == 2:
            break
    seen += [batch.tolist() for batch in loader]
    assert seen == order
    assert loader.sampler.state()["epoch"] == 1


def test_the_loader_draws_no_random_numbers() -> None:
    """Iterating leaves torch's generator where it was, so that a resumed run drops the same activations."""
    before = torch.get_rng_state()
    list(Loader(TensorDataset(torch.arange(20)), sampler(20, 4), None))
    assert torch.equal(torch.get_rng_state(), before)
