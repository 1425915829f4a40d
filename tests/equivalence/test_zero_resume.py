"""Sharded checkpoints: saved under any stage, group and world, continued under any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain
import pytest
import sharded
import torch
from torch import nn

import powertrain

STEPS = 6
SAVED_AFTER = 3
MICRO_BATCHES = 4


def run(config: dict[str, Any], directory: str, load: bool) -> dict[str, Any]:
    """Train to STEPS, from the start or from the checkpoint; run on every rank."""
    model = sharded.make_tower(99 if load else 7)
    optimizer = torch.optim.AdamW(sharded.groups_of(model), lr=1e-3)
    losses: dict[int, float] = {}
    with powertrain.initialize(model, config, loss_fn=nn.CrossEntropyLoss(), optimizer=optimizer) as engine:
        if load:
            engine.load_checkpoint(directory)
        state = sharded.slices(engine)
        share = engine.context.batch.accumulation
        mine = sharded.data(MICRO_BATCHES)[engine.data_rank * share : (engine.data_rank + 1) * share]
        while engine.global_step < STEPS:
            losses[engine.global_step] = float(engine.train_step(iter(mine)))
            if engine.global_step == SAVED_AFTER and not load:
                engine.save_checkpoint(directory)
                state = sharded.slices(engine)
        return {"losses": losses, "state": state}


def layout(stage: int, world: int, **zero: Any) -> tuple[int, dict[str, Any]]:
    """Return a world and the configuration of a stage in it; 0 is replicated."""
    config: dict[str, Any] = {"batch": {"accumulation": MICRO_BATCHES // world}, "optimizer": {"clip": 1.0}}
    if stage:
        config["zero"] = {"stage": stage, "bucket": 500, **zero}
    return world, config


LAYOUTS = [layout(0, 1), layout(0, 2), layout(1, 4), layout(2, 2), layout(3, 4), layout(3, 2, unit=300),
           layout(3, 4, shard_group=2), layout(2, 4, shard_group=2), layout(3, 1)]  # fmt: skip


def _name(value: tuple[int, dict[str, Any]]) -> str:
    return f"{value[1].get('zero', {'stage': 0})}x{value[0]}"


@pytest.mark.parametrize("saved_as", [LAYOUTS[1], LAYOUTS[4], LAYOUTS[7]], ids=_name)
def test_any_layout_loads_any_other(ranks: Any, tmp_path: Path, saved_as: tuple[int, dict[str, Any]]) -> None:
    """Parameters and optimizer state load bit-equal under every stage, group and world; the next losses are equal."""
    world, config = saved_as
    saved = ranks(world, run, config, str(tmp_path), False)
    state = sharded.whole([r["state"] for r in saved])
    for other_world, other in LAYOUTS:
        loaded = ranks(other_world, run, other, str(tmp_path), True)
        assert plain.same_bits(sharded.whole([r["state"] for r in loaded]), state)
        for mine in loaded:
            expected = {step: saved[0]["losses"][step] for step in mine["losses"]}
            assert mine["losses"] == pytest.approx(expected, rel=1e-5)
            assert sorted(mine["losses"]) == list(range(SAVED_AFTER + 1, STEPS + 1))


def run_matrices(kind: type[torch.optim.Optimizer], config: dict[str, Any], directory: str, load: bool) -> Any:
    """Train matrices with an optimizer that must see them whole, on from a checkpoint or up to one."""
    torch.manual_seed(99 if load else 3)
    model = nn.Sequential(*(nn.Linear(plain.FEATURES, plain.FEATURES, bias=False) for _ in range(5)))
    with powertrain.initialize(
        model, config, loss_fn=nn.CrossEntropyLoss(), optimizer=kind(model.parameters(), lr=1e-2)
    ) as engine:
        if load:
            engine.load_checkpoint(directory)
        share = engine.context.batch.accumulation
        mine = [(x, y) for x, _, y in sharded.data(MICRO_BATCHES)][engine.data_rank * share :][:share]
        losses = [float(engine.train_step(iter(mine))) for _ in range(3)]
        if not load:
            engine.save_checkpoint(directory)
        state = sharded.slices(engine)
        return {"losses": losses, "state": state, "next": [float(engine.train_step(iter(mine))) for _ in range(3)]}


@pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.Adafactor])
def test_optimizers_of_whole_matrices_resume(ranks: Any, tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    """State that has another shape than its parameter, or none but a momentum, is loaded under another layout."""
    world, config = layout(3, 2)
    config["optimizer"] = {}
    saved = ranks(world, run_matrices, kind, config, str(tmp_path), False)
    for other_world, other in (layout(1, 4), layout(3, 4), layout(0, 1)):
        loaded = ranks(other_world, run_matrices, kind, {**other, "optimizer": {}}, str(tmp_path), True)
        for mine in loaded:
            assert mine["losses"] == pytest.approx(saved[0]["next"], rel=1e-5)
