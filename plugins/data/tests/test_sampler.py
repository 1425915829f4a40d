"""The sampler of ``[data]``: every sample once, and exact resumption on any layout."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powertrain.config.batch import BatchSizes
from powertrain.errors import DataError
from powertrain.mesh import Mesh
from powertrain.testing.sampler import SamplerContract
from powertrain_data.plugin import DataConfig, DataPlugin
from powertrain_data.sampler import ShuffledSampler, length_of


@attrs.frozen
class Layout:
    """How a run is split."""

    ranks: int
    micro: int
    accumulation: int

    @property
    def total(self) -> int:
        """Samples in one global batch."""
        return self.ranks * self.micro * self.accumulation

    def samplers(self, length: int, seed: int, *, shuffle: bool = True) -> list[ShuffledSampler]:
        """Return the samplers of all ranks."""
        sizes = BatchSizes(micro=self.micro, accumulation=self.accumulation, total=self.total, origins={})
        return [
            ShuffledSampler(length, sizes, data_rank=rank, data_size=self.ranks, seed=seed, shuffle=shuffle)
            for rank in range(self.ranks)
        ]


def run(samplers: list[ShuffledSampler], steps: int) -> list[int]:
    """Train for some steps, over ends of epochs, and return the samples in order."""
    seen: list[int] = []
    while steps:
        for batches in islice(zip(*samplers, strict=True), steps):
            seen += [sample for batch in batches for sample in batch]
            steps -= 1
            for sampler in samplers:
                sampler.advance()
    return seen


layouts = st.builds(Layout, ranks=st.integers(1, 4), micro=st.integers(1, 4), accumulation=st.integers(1, 3))
seeds = st.integers(0, 2**63 - 1)
lengths = st.integers(48, 400)


class TestContract(SamplerContract):
    """Every test of the contract, shuffled."""

    def make(self, length: int, total: int, index: int, size: int, seed: int) -> ShuffledSampler:
        """Return the sampler of one slice."""
        sizes = BatchSizes(micro=total // size, accumulation=1, total=total, origins={})
        return ShuffledSampler(length, sizes, data_rank=index, data_size=size, seed=seed)


@given(layouts, lengths, seeds)
def test_an_epoch_takes_each_sample_at_most_once(layout: Layout, length: int, seed: int) -> None:
    """Over any layout, an epoch's samples are distinct and only an incomplete global batch is left out."""
    samplers = layout.samplers(length, seed)
    seen = run(samplers, len(samplers[0]))
    assert len(set(seen)) == len(seen) == length // layout.total * layout.total
    assert {sampler.epoch for sampler in samplers} == {1}


@given(layouts, layouts, lengths, seeds)
def test_the_order_does_not_depend_on_the_layout(first: Layout, second: Layout, length: int, seed: int) -> None:
    """Two layouts go through one epoch in the same order, as far as both complete it."""
    orders = [
        run(samplers, len(samplers[0])) for samplers in (first.samplers(length, seed), second.samplers(length, seed))
    ]
    shared = min(map(len, orders))
    assert orders[0][:shared] == orders[1][:shared]


@pytest.mark.parametrize("micro", [3, 1500])
def test_long_epochs_are_the_same_order(micro: int) -> None:
    """Batches smaller and larger than the stretch that is computed at once join into the epoch's order."""
    (order,) = Layout(1, 7000, 1).samplers(7000, 1)[0]
    samplers = Layout(2, micro, 1).samplers(7000, 1)
    seen = run(samplers, len(samplers[0]))
    assert seen == order[: len(seen)]
    assert 7000 - len(seen) < 2 * micro


@given(layouts, layouts, lengths, seeds, st.data())
def test_another_layout_resumes_at_the_exact_next_sample(
    before: Layout, after: Layout, length: int, seed: int, data: st.DataObject
) -> None:
    """Stopped anywhere in an epoch and resumed on any layout, the epoch's order goes on where it stopped."""
    (order,) = Layout(1, length, 1).samplers(length, seed)[0]
    old = before.samplers(length, seed)
    steps = data.draw(st.integers(0, len(old[0]) - 1))
    seen = run(old, steps)
    new = after.samplers(length, seed)
    for sampler in new:
        sampler.load_state(json.loads(json.dumps(old[0].state())))
    left = (length - len(seen)) // after.total
    seen += run(new, left)
    assert seen == order[: len(seen)]
    assert length - len(seen) < after.total


@given(layouts, lengths, seeds, st.integers(0, 60), st.integers(1, 20))
def test_the_same_layout_resumes_over_epochs(layout: Layout, length: int, seed: int, taken: int, more: int) -> None:
    """A resumed run sees the samples of the uninterrupted one, in later epochs too."""
    whole = run(layout.samplers(length, seed), taken + more)
    old = layout.samplers(length, seed)
    head = run(old, taken)
    new = layout.samplers(length, seed)
    for one, other in zip(new, old, strict=True):
        one.load_state(other.state())
    assert head + run(new, more) == whole


def test_a_rest_too_small_for_the_new_layout_begins_the_next_epoch() -> None:
    """What no longer fills a global batch is left out, and iteration does not come up empty."""
    old = Layout(1, 4, 1).samplers(50, 0)
    run(old, 11)  # 6 samples are left
    (new,) = Layout(1, 8, 1).samplers(50, 0)
    new.load_state(old[0].state())
    assert (new.epoch, new.consumed) == (1, 0)
    assert len(list(new)) == 6


def test_epochs_and_seeds_differ() -> None:
    """The next epoch, and another seed, give another order."""
    (sampler,) = Layout(1, 8, 1).samplers(80, 1)
    first, second = run([sampler], 10), run([sampler], 10)
    assert sorted(first) == sorted(second)
    assert first != second
    assert run(Layout(1, 8, 1).samplers(80, 2), 10) != first


def test_unshuffled_keeps_the_order_of_the_dataset() -> None:
    """With shuffle = false every epoch goes through the dataset from its start."""
    samplers = Layout(2, 2, 1).samplers(10, 0, shuffle=False)
    assert run(samplers, 4) == [*range(8), *range(8)]


def test_ranks_take_contiguous_slices() -> None:
    """Rank r's local batch is the r-th slice of the global batch."""
    samplers = Layout(2, 1, 3).samplers(12, 0, shuffle=False)
    assert [list(sampler) for sampler in samplers] == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]


def test_a_dataset_shorter_than_a_batch_shows_the_arithmetic() -> None:
    """The error gives the product that the dataset falls short of."""
    with pytest.raises(DataError) as caught:
        Layout(4, 3, 2).samplers(23, 0)
    assert "at least 24 = micro 3 x accumulation 2 x 4 data ranks" in str(caught.value)
    assert "23 samples" in caught.value.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"length": 99}, "length = 99"),
        ({"seed": 5}, "[data] seed = 5"),
        ({"shuffle": False}, "[data] shuffle = false"),
    ],
)
def test_a_position_that_means_something_else_is_refused(change: dict[str, Any], says: str) -> None:
    """Another dataset, seed or order is an error that names both values, and nothing is taken over."""
    (sampler,) = Layout(1, 4, 1).samplers(50, 0)
    sampler.advance()
    with pytest.raises(DataError) as caught:
        sampler.load_state({**sampler.state(), "consumed": 8, **change})
    assert says in str(caught.value)
    assert sampler.consumed == 4


def test_a_position_of_another_sampler_is_refused() -> None:
    """A state that another kind of sampler wrote is refused, even where all fields are there."""
    (sampler,) = Layout(1, 4, 1).samplers(50, 0)
    with pytest.raises(DataError, match="another sampler wrote it") as caught:
        sampler.load_state({**sampler.state(), "kind": "epoch"})
    assert "kind = epoch" in str(caught.value)
    with pytest.raises(DataError, match="another sampler wrote it"):
        sampler.load_state({"epoch": 0, "consumed": 8, "length": 50, "seed": 0})


def test_a_dataset_without_length_is_refused() -> None:
    """An iterable dataset cannot be dealt out, and the error says what can be done."""
    with pytest.raises(DataError, match="generator has no length"):
        length_of(number for number in range(3))


@pytest.mark.parametrize(("config", "seed"), [(DataConfig(), 11), (DataConfig(seed=4), 4)])
def test_the_plugin_takes_sizes_from_the_context(config: DataConfig, seed: int) -> None:
    """Slice, sizes and seed come from mesh, batch and configuration; only the data dimension counts."""
    sizes = BatchSizes(micro=2, accumulation=3, total=12, origins={})
    context: Any = SimpleNamespace(
        batch=sizes,
        mesh=Mesh.build(4, 2, {"tensor": 2}),  # ranks 2 and 3 are data index 1
        config=SimpleNamespace(run=SimpleNamespace(seed=11)),
    )
    made = DataPlugin(config).make_sampler([0] * 100, context)
    same = ShuffledSampler(100, sizes, data_rank=1, data_size=2, seed=seed)
    assert made.state() == same.state()
    assert list(made) == list(same)


def test_the_plugin_is_light() -> None:
    """Importing the entry point's module loads neither torch nor numpy."""
    code = "import sys, powertrain_data.plugin; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
