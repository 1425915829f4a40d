"""Engines of ranks that are not there: a large layout in one process."""

from __future__ import annotations

import pytest
import torch

import powertrain
from powertrain.testing.null import NullPlugin

CONFIG = {"accelerator": {"use": "null"}, "batch": {"micro": 2, "accumulation": 2}, "precision": {"compute": "bf16"}}


@pytest.fixture
def as_rank(monkeypatch):
    """Pretend to be one rank of a launch."""

    def pretend(rank, world_size):
        monkeypatch.setenv("POWERTRAIN_PLUGINS", "null")
        here = min(world_size, 8)
        places = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
        for name, value in places.items():
            monkeypatch.setenv(name, str(value))

    return pretend


def test_any_rank_of_a_thousand_can_be_built(as_rank):
    """Rank 701 of 1,024 builds, takes a step without memory, and would average over all of them."""
    as_rank(701, 1024)
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2**20, 2**16), torch.nn.Linear(2**16, 1))
    batch = (torch.empty(4, 2**20, device="meta"), torch.empty(4, 1, device="meta"))
    with powertrain.initialize(model, CONFIG, loss_fn=torch.nn.functional.mse_loss, plugins=[NullPlugin()]) as engine:
        assert (engine.data_rank, engine.data_size) == (701, 1024)
        assert engine.context.batch.total == 4096
        engine.train_step(batch)
        issued = engine.context.communicator.issued
        averaged = sum(c.input.numel() for c in issued if c.operation == "all_reduce" and "gradients" in c.label)
        assert averaged >= 2**36


def test_two_engines_do_not_share_a_null_device(as_rank):
    """Each engine has stand-ins of its own."""
    as_rank(0, 4)
    model = torch.nn.Linear(2, 2).to("meta")
    with (
        powertrain.initialize(model, CONFIG, plugins=[NullPlugin()]) as first,
        powertrain.initialize(torch.nn.Linear(2, 2).to("meta"), CONFIG, plugins=[NullPlugin()]) as second,
    ):
        assert first.context.accelerator is not second.context.accelerator
        assert first.context.communicator is not second.context.communicator
