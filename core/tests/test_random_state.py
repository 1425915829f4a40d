"""Random generators: seeded together, saved and continued together."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import numpy
import pytest
import torch

from powertrain import random_state
from powertrain.context import Context
from powertrain.testing.loopback import LoopbackWorld
from powertrain.testing.null import NullAccelerator
from powertrain.testing.surroundings import make_context


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    """Leave the generators of the test run as they were."""
    before = random.getstate(), torch.get_rng_state(), numpy.random.get_state()
    yield
    random.setstate(before[0])
    torch.set_rng_state(before[1])
    numpy.random.set_state(before[2])


def context(rank: int = 0, sizes: dict[str, int] | None = None) -> Context:
    return make_context(LoopbackWorld(4, sizes).communicators[rank])


def draw() -> tuple[float, float, float, float]:
    """Draw from every generator, Gaussians included, which keep a spare."""
    return random.random(), random.gauss(0, 1), float(torch.randn(())), float(numpy.random.standard_normal())


def test_a_seed_fixes_every_generator() -> None:
    """The same seed gives the same numbers everywhere, another one others."""
    random_state.seed_all(context(), 5)
    first = draw()
    random_state.seed_all(context(), 5)
    assert draw() == first
    random_state.seed_all(context(), 6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_ranks_of_other_data_differ() -> None:
    """Ranks along the data dimension draw other numbers; those along tensor draw the same."""
    seen = []
    for rank in range(4):
        random_state.seed_all(context(rank, {"tensor": 2}), 5)
        seen.append(draw())
    assert seen[0] == seen[1] != seen[2] == seen[3]


def test_neighbouring_seeds_share_no_rank() -> None:
    """Runs that differ in their seed by a little share no rank's numbers, so averages over seeds mean something."""
    seen = []
    for seed in range(4):
        for rank in range(4):
            random_state.seed_all(context(rank), seed)
            seen.append(draw())
    for kind in zip(*seen, strict=True):
        assert len(set(kind)) == 16


def test_the_first_rank_has_the_seed_itself() -> None:
    """The first rank draws what ``torch.manual_seed`` of the configured seed gives."""
    random_state.seed_all(context(), 5)
    found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(3))


def test_any_seed_of_the_schema_fits() -> None:
    """The largest legal seed overflows no generator."""
    random_state.seed_all(context(3), 2**63 - 1)


def test_generators_continue_from_their_state() -> None:
    """Saved through JSON and tensors, every generator goes on with the next number."""
    random_state.seed_all(context(), 5)
    draw()
    values = json.loads(json.dumps(random_state.state_values()))
    tensors = {name: tensor.clone() for name, tensor in random_state.state_tensors(context()).items()}
    expected = [draw() for _ in range(3)]
    random_state.seed_all(context(), 99)
    random_state.load_values(values)
    random_state.load_tensors(context(), tensors)
    assert [draw() for _ in range(3)] == expected


def test_the_device_has_a_generator_of_its_own() -> None:
    """A device that is not the host is saved and restored through its accelerator, another kind's state is not."""
    accelerator = NullAccelerator()
    communicator = LoopbackWorld(1).communicators[0]
    communicator.device = torch.device("meta")
    there = make_context(communicator, accelerator=accelerator)
    tensors = random_state.state_tensors(there)
    assert set(tensors) == {"torch", "null"}
    accelerator.calls.clear()
    random_state.load_tensors(there, {"torch": tensors["torch"], "other": tensors["null"]})
    assert accelerator.calls == []
    random_state.load_tensors(there, tensors)
    assert accelerator.calls == ["set_rng_state"]
