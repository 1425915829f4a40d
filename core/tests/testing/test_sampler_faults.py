"""Samplers with one fault each: the contract must catch every one."""

from __future__ import annotations

import pytest

from powertrain.config import BatchSizes
from powertrain.sampling import EpochSampler
from powertrain.testing.sampler import SamplerContract


class DuplicatesASample(EpochSampler):
    def __iter__(self):
        previous = None
        for batch in super().__iter__():
            yield batch if previous is None else [previous, *batch[1:]]
            previous = batch[0]


class ForgetsThePosition(EpochSampler):
    def load_state(self, state):
        super().load_state({**state, "consumed": 0})


class ForgetsTheEpoch(EpochSampler):
    def load_state(self, state):
        super().load_state({**state, "epoch": 0})


class ResumesOneBatchLate(EpochSampler):
    def load_state(self, state):
        super().load_state(state)
        self.advance()


class CountsWhatWasReadAhead(EpochSampler):
    def __iter__(self):
        for batch in super().__iter__():
            self.consumed += self.sizes.total
            yield batch


class GivesEveryRankTheSame(EpochSampler):
    def __init__(self, *args):
        super().__init__(*args)
        self.first = 0


class ShufflesByRanks(EpochSampler):
    def __init__(self, length, sizes, data_rank, data_size, seed):
        super().__init__(length, sizes, data_rank, data_size, seed + data_size)


class CountsSamplesOfOneRank(EpochSampler):
    def state(self):
        return {**super().state(), "consumed": self.consumed // self.sizes.total * self.local}


class KeepsItsRankInTheState(EpochSampler):
    def state(self):
        return {**super().state(), "first": self.first}


class AcceptsAnotherDataset(EpochSampler):
    def load_state(self, state):
        super().load_state({**state, "length": self.length})


class StopsAfterAnEpoch(EpochSampler):
    def advance(self):
        self.consumed += self.sizes.total


class DropsALot(EpochSampler):
    def __iter__(self):
        yield from list(super().__iter__())[:-1]


FAULTS = {
    DuplicatesASample: "test_an_epoch_is_the_dataset",
    ForgetsThePosition: "test_resumes_at_the_exact_sample",
    ForgetsTheEpoch: "test_resumes_at_the_exact_sample",
    ResumesOneBatchLate: "test_resumes_at_the_exact_sample",
    CountsWhatWasReadAhead: "test_reading_ahead_takes_nothing",
    GivesEveryRankTheSame: "test_an_epoch_is_the_dataset",
    ShufflesByRanks: "test_global_batches_do_not_depend_on_ranks",
    CountsSamplesOfOneRank: "test_resumes_on_another_world_size",
    KeepsItsRankInTheState: "test_the_state_is_json_and_common",
    AcceptsAnotherDataset: "test_a_position_in_another_dataset_is_refused",
    StopsAfterAnEpoch: "test_epochs_follow_one_another",
    DropsALot: "test_an_epoch_is_the_dataset",
}
"""Each fault, and the test that is there to catch it."""


def suite(sampler):
    class Suite(SamplerContract):
        def make(self, length, total, index, size, seed):
            sizes = BatchSizes(micro=total // size, accumulation=1, total=total, origins={})
            return sampler(length, sizes, index, size, seed)

    return Suite


def test_the_healthy_one_passes(contract):
    """A sampler without a fault fails no test."""
    assert contract.failures(suite(EpochSampler)) == []


@pytest.mark.parametrize(("fault", "test"), FAULTS.items())
def test_the_fault_is_caught(contract, fault, test):
    """A sampler with one fault fails the test that is there for it."""
    assert contract.failures(suite(fault), test), f"{test} passed"
