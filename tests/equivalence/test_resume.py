"""Saved under one number of ranks, continued under another: the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import powertrain

TOTAL = 12
SAVED_AFTER = 10
STEPS = 16


def config(total: int, accumulation: int, precision: dict[str, Any]) -> dict[str, Any]:
    return {
        "batch": {"total": total, "accumulation": accumulation},
        "optimizer": {"lr": 2e-3, "clip": 0.5},
        "scheduler": {"name": "cosine", "steps": 40, "warmup": 4, "final": 0.1},
        "precision": precision,
        "run": {"seed": 5},
    }


def everything(engine: powertrain.Engine) -> dict[str, torch.Tensor]:
    """Return parameters (masters) and optimizer state by global name."""
    return {s.name: s.tensor.clone() for s in engine.optimizer_wrapper.tensors()}


def run(
    directory: str, load: bool, save_after: int | None, accumulation: int, precision: dict[str, Any]
) -> dict[str, Any]:
    """Train to STEPS on every rank, from the start or from the checkpoint."""
    inputs, targets = plain.make_data(100)
    settings = config(TOTAL, accumulation, precision)
    model = plain.make_model(99 if load else 3)
    losses: dict[int, float] = {}
    with powertrain.initialize(model, settings, TensorDataset(inputs, targets), nn.CrossEntropyLoss()) as engine:
        report = None
        if load:
            report = engine.load_checkpoint(directory)
        state = everything(engine) if load else {}
        rate = engine.learning_rate
        while engine.global_step < STEPS:
            for batch in engine.loader:
                losses[engine.global_step] = float(engine.train_step(batch))
                if engine.global_step == save_after:
                    engine.save_checkpoint(directory, client_state={"note": "half-way"})
                    state, rate = everything(engine), engine.learning_rate
                if engine.global_step == STEPS:
                    break
        final = everything(engine)
    return {"losses": losses, "state": state, "rate": rate, "final": final, "report": report}


@pytest.mark.parametrize("precision", [{}, {"compute": "bf16"}, {"compute": "fp16"}], ids=["fp32", "bf16", "fp16"])
def test_saved_at_four_continues_at_one_two_and_three(ranks: Any, tmp_path: Path, precision: dict[str, Any]) -> None:
    """Parameters, moments, step and rate load bit-equal at 1, 2 and 3 ranks, and the next losses are the same."""
    saved = ranks(4, run, str(tmp_path), False, SAVED_AFTER, 1, precision)[0]
    tolerance = 1e-5 if not precision else 2e-2
    for world, accumulation in ((1, 4), (2, 2), (3, 1), (4, 1)):
        for loaded in ranks(world, run, str(tmp_path), True, None, accumulation, precision):
            assert loaded["report"].step == SAVED_AFTER
            assert loaded["report"].world_size == 4
            assert loaded["report"].client_state == {"note": "half-way"}
            assert loaded["report"].fresh == []
            assert plain.same_bits(loaded["state"], saved["state"])
            assert loaded["rate"] == saved["rate"]
            assert sorted(loaded["losses"]) == list(range(SAVED_AFTER + 1, STEPS + 1))
            expected = {step: saved["losses"][step] for step in loaded["losses"]}
            assert loaded["losses"] == pytest.approx(expected, rel=tolerance)
            if world == 4:
                assert loaded["losses"] == expected
                assert plain.same_bits(loaded["final"], saved["final"])


def test_saved_at_two_continues_at_four(ranks: Any, tmp_path: Path) -> None:
    """More ranks than saved: those that did not exist then start their own random generators and join in."""
    saved = ranks(2, run, str(tmp_path), False, SAVED_AFTER, 1, {})[0]
    for loaded in ranks(4, run, str(tmp_path), True, None, 1, {}):
        assert plain.same_bits(loaded["state"], saved["state"])
        expected = {step: saved["losses"][step] for step in loaded["losses"]}
        assert loaded["losses"] == pytest.approx(expected, rel=1e-5)


def dropout_run(directory: str, load: bool) -> list[float]:
    """Train a model with dropout; the losses depend on the random generators."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(plain.FEATURES, 32), nn.Dropout(0.5), nn.Linear(32, plain.CLASSES))
    losses = []
    with powertrain.initialize(model, {"run": {"seed": 9}}, loss_fn=nn.CrossEntropyLoss()) as engine:
        if load:
            engine.load_checkpoint(directory)
        for step in range(engine.global_step, 8):
            if step == 4 and not load:
                engine.save_checkpoint(directory)
            losses.append(float(engine.train_step(plain.piece(plain.make_data(), engine.data_rank, engine.data_size))))
    return losses


@pytest.mark.parametrize("world", [1, 2])
def test_random_generators_go_on(ranks: Any, tmp_path: Path, world: int) -> None:
    """A resumed run draws the random numbers that the uninterrupted one drew."""
    whole = ranks(world, dropout_run, str(tmp_path), False)
    resumed = ranks(world, dropout_run, str(tmp_path), True)
    assert [losses[4:] for losses in whole] == resumed
