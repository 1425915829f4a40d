"""What each rank holds after a step: ZeRO's formula, and little more."""

from __future__ import annotations

from typing import Any

import company
import pytest
import torch
from torch import nn

import powertrain

WIDTH, DEPTH = 128, 10


def make() -> nn.Sequential:
    """Return equal blocks, each a unit, without anything outside of them."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(DEPTH))
    )


def held(settings: dict[str, Any]) -> dict[str, int]:
    """Train two steps; return the bytes of all tensors that were not there before; run on every rank."""
    before = company.live_bytes()
    model = make()
    count = sum(param.numel() for param in model.parameters())
    with powertrain.initialize(model, settings, loss_fn=nn.functional.mse_loss) as engine:
        batch = (torch.randn(4, WIDTH), torch.randn(4, WIDTH))
        for _ in range(2 * settings["batch"]["accumulation"]):
            engine.train_step(iter([batch] * settings["batch"]["accumulation"]))
        del batch
        return {"bytes": company.live_bytes() - before, "parameters": count}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_model_state_is_as_small_as_the_formula(ranks: Any, stage: int, accumulation: int, world: int) -> None:
    """fp32: 4+4+8/N, 4+(4+8)/N and 16/N bytes a parameter, plus 3 % and at most two units."""
    settings = {
        "zero": {"stage": stage, "bucket": 3 * WIDTH * WIDTH},
        "batch": {"accumulation": accumulation},
        "optimizer": {"name": "adamw"},
    }
    formula = {1: 8 + 8 / world, 2: 4 + 12 / world, 3: 16 / world}[stage]
    for found in ranks(world, held, settings):
        unit = 4 * found["parameters"] / DEPTH
        assert found["bytes"] <= 1.03 * formula * found["parameters"] + 2 * unit
        assert found["bytes"] >= 0.9 * (4 + 12 / world if stage < 3 else formula) * found["parameters"]
