"""What every sampler must do, as a class of tests."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from powertrain.errors import DataError
from powertrain.roles.sampler import Sampler

LENGTH, TOTAL, SEED = 103, 12, 5


class SamplerContract:
    """Tests of one sampler.

    A local batch is the global batch cut into as many equal pieces as there
    are data ranks.
    """

    def make(self, length: int, total: int, index: int, size: int, seed: int) -> Sampler:
        """Return a new sampler.

        Args:
            length: samples in the dataset.
            total: samples in one global batch, a multiple of ``size``.
            index: which slice of the global batch it feeds.
            size: into how many slices the global batch is cut.
            seed: of its shuffling.
        """
        raise NotImplementedError

    def world(self, size: int, *, seed: int = SEED, taken: int = 0) -> list[Sampler]:
        """Return the samplers of all ranks, after ``taken`` batches."""
        samplers = [self.make(LENGTH, TOTAL, index, size, seed) for index in range(size)]
        for sampler in samplers:
            for _ in range(taken):
                sampler.advance()
        return samplers

    @staticmethod
    def batches(samplers: list[Sampler]) -> list[set[int]]:
        """Return the global batches that the samplers would yield next, checking that ranks do not overlap."""
        columns = [list(sampler) for sampler in samplers]
        assert len({len(column) for column in columns}) == 1, "ranks yield different numbers of batches"
        result = []
        for pieces in zip(*columns, strict=True):
            together = [sample for piece in pieces for sample in piece]
            assert len(set(together)) == len(together), f"a sample comes twice in one global batch: {together}"
            result.append(set(together))
        return result

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_an_epoch_is_the_dataset(self, size: int) -> None:
        """An epoch holds each sample at most once, and leaves out less than one global batch."""
        seen = [sample for batch in self.batches(self.world(size)) for sample in batch]
        assert len(set(seen)) == len(seen), "a sample comes twice in one epoch"
        assert set(seen) <= set(range(LENGTH))
        assert LENGTH - len(seen) < TOTAL

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_batches_are_local(self, size: int) -> None:
        """Each rank gets its share of each global batch, as plain integers; only the last may be smaller."""
        for sampler in self.world(size):
            batches = list(sampler)
            assert all(len(batch) == TOTAL // size for batch in batches[:-1])
            assert all(type(sample) is int for batch in batches for sample in batch)

    def test_length_is_the_number_of_batches(self) -> None:
        """``len`` is what a whole epoch yields, wherever the position stands."""
        (sampler,) = self.world(1)
        assert len(sampler) == len(list(sampler))
        sampler.advance()
        assert len(sampler) == len(list(sampler)) + 1

    def test_the_seed_fixes_the_order(self) -> None:
        """Two samplers with one seed yield the same."""
        first, second = self.world(1), self.world(1)
        assert list(first[0]) == list(second[0])

    def test_global_batches_do_not_depend_on_ranks(self) -> None:
        """One, two and three ranks train on the same samples in each step."""
        assert self.batches(self.world(1)) == self.batches(self.world(2)) == self.batches(self.world(3))

    def test_reading_ahead_takes_nothing(self) -> None:
        """Iterating does not move the position; ``advance`` does, by one batch."""
        (sampler,) = self.world(1)
        everything = list(sampler)
        list(islice(sampler, 3))
        assert list(sampler) == everything
        sampler.advance()
        sampler.advance()
        assert list(sampler) == everything[2:]

    def test_epochs_follow_one_another(self) -> None:
        """After the last batch the next epoch begins, whole."""
        samplers = self.world(2)
        for sampler in samplers:
            for _ in range(len(sampler)):
                sampler.advance()
        seen = [sample for batch in self.batches(samplers) for sample in batch]
        assert len(set(seen)) == len(seen)
        assert LENGTH - len(seen) < TOTAL

    def test_the_state_is_json_and_common(self) -> None:
        """The position survives JSON, and is the same on every rank."""
        states = [sampler.state() for sampler in self.world(3, taken=4)]
        assert json.loads(json.dumps(states[0])) == states[0]
        assert states[0] == states[1] == states[2]

    @pytest.mark.parametrize("taken", [0, 1, 5, 8, 11])
    def test_resumes_at_the_exact_sample(self, taken: int) -> None:
        """A new sampler given the state yields what the old one would have, in this epoch and the next."""
        (old,) = self.world(1, taken=taken)
        (new,) = self.world(1)
        new.load_state(json.loads(json.dumps(old.state())))
        for _ in range(2):
            assert list(new) == list(old)
            for sampler in (old, new):
                for _ in range(len(list(sampler))):
                    sampler.advance()

    @pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
    def test_resumes_on_another_world_size(self, before: int, after: int) -> None:
        """The rest of the epoch is the same set of samples, step by step, on more or fewer ranks."""
        old, new = self.world(before, taken=3), self.world(after)
        for sampler in new:
            sampler.load_state(json.loads(json.dumps(old[0].state())))
        assert self.batches(new) == self.batches(old)

    def test_a_position_in_another_dataset_is_refused(self) -> None:
        """A state of a dataset of another length is a DataError."""
        state = self.make(LENGTH + 40, TOTAL, 0, 1, SEED).state()
        with pytest.raises(DataError):
            self.make(LENGTH, TOTAL, 0, 1, SEED).load_state(state)

    def test_a_dataset_without_a_batch_is_refused(self) -> None:
        """Fewer samples than one global batch are a DataError, or an epoch of one small batch: never none."""
        try:
            sampler = self.make(TOTAL - 1, TOTAL, 0, 1, SEED)
        except DataError:
            return
        assert sum(len(batch) for batch in sampler) == TOTAL - 1
