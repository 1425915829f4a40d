"""Training with compressed gradients, replicated and sharded: it learns as the exact run does, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from torch import nn

import powertrain

STEPS = 80
SAVED_AFTER = 6


def run(config: dict[str, Any], steps: int, directory: str = "", load: bool = False) -> dict[str, Any]:
    """Train; run on every rank."""
    model = plain.make_model(99 if load else 3)
    with powertrain.initialize(model, config, loss_fn=nn.CrossEntropyLoss()) as engine:
        if load:
            engine.load_checkpoint(directory)
        mine = plain.piece(plain.make_data(), engine.data_rank, engine.context.mesh.size("data"))
        losses = {}
        while engine.global_step < steps:
            losses[engine.global_step] = float(engine.train_step(mine))
            if directory and not load and engine.global_step == SAVED_AFTER:
                engine.save_checkpoint(directory)
        return {"losses": losses, "owed": sorted(engine.context.communicator.state())}


def config_of(stage: int, method: str, **more: Any) -> dict[str, Any]:
    compress = {"method": method, "least": 1, "block": 32, "ratio": 0.1, **more}
    config: dict[str, Any] = {
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "comm": {"compress": compress},
    }
    return config | ({"zero": {"stage": stage}} if stage else {})


ADAM, SGD = {"name": "adamw", "lr": 3e-3}, {"name": "sgd", "lr": 0.2}
ROWS: list[tuple[dict[str, Any], str]] = [(ADAM, "int8"), (ADAM, "int4"), (SGD, "int4"), (SGD, "onebit"), (SGD, "topk")]
"""Adam's second moment takes the noise of one bit for signal: that is what 1-bit Adam freezes it for."""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_compressed_runs_learn_as_exact_ones_do(ranks: Any, stage: int) -> None:
    """The loss falls nine tenths as far at least, by every method at every stage; it was on, so something was owed."""
    falls, exact = {}, {}
    for optimizer, method in ROWS:
        name = optimizer["name"]
        if name not in exact:
            plainly = ranks(2, run, config_of(stage, "none") | {"optimizer": optimizer}, STEPS)[0]
            assert not plainly["owed"]
            exact[name] = plainly["losses"]
        first, second = ranks(2, run, config_of(stage, method) | {"optimizer": optimizer}, STEPS)
        assert first["losses"] == second["losses"]
        assert first["owed"] and first["losses"] != exact[name]
        fall = exact[name][1] - exact[name][STEPS]
        assert fall > 0.3
        falls[name, method] = (first["losses"][1] - first["losses"][STEPS]) / fall
    assert min(falls.values()) > 0.9, falls


@pytest.mark.parametrize(("name", "stage"), [("onebit_adam", 0), ("onebit_adam", 2), ("onebit_lamb", 0)])
def test_the_optimizer_says_when(ranks: Any, name: str, stage: int) -> None:
    """Exact until its second moment is frozen, one bit afterwards."""
    config = config_of(stage, "optimizer")
    config["optimizers"] = {}
    config["optimizer"] = {"name": name, "lr": 1e-3, "freeze_step": 5}
    assert not ranks(2, run, config, 5)[0]["owed"]
    assert ranks(2, run, config, 8)[0]["owed"]


@pytest.mark.parametrize("stage", [0, 2])
def test_compressed_runs_resume(ranks: Any, tmp_path: Path, stage: int) -> None:
    """On as many ranks with the very losses of the run that went on; on others, from what all owed together."""
    config = config_of(stage, "onebit")
    went = ranks(2, run, config, 10, str(tmp_path))
    on = ranks(2, run, config, 10, str(tmp_path), True)
    for before, after in zip(went, on, strict=True):
        assert after["losses"] == {step: before["losses"][step] for step in after["losses"]}
        assert len(after["losses"]) == 10 - SAVED_AFTER
    for other in (1, 4):
        losses = ranks(other, run, config, 10, str(tmp_path), True)[0]["losses"]
        assert losses[SAVED_AFTER + 1] == pytest.approx(went[0]["losses"][SAVED_AFTER + 1], rel=1e-5)
        assert all(torch.tensor(list(losses.values())).isfinite())


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_in_fp16_goes_on_in_other_formats(ranks: Any, tmp_path: Path, stage: int) -> None:
    """Debts lie in checkpoints without the loss scale: a run that has another, or none, owes no more."""
    config = config_of(stage, "int4") | {"optimizer": SGD, "precision": {"compute": "fp16"}}
    went = ranks(2, run, config, 12, str(tmp_path))[0]["losses"]
    for precision in ({"compute": "fp16"}, {"compute": "fp16", "loss_scale": 4.0}, {"compute": "fp32"}):
        on = ranks(2, run, config | {"precision": precision}, 12, str(tmp_path), True)[0]["losses"]
        if precision == config["precision"]:
            assert on == {step: went[step] for step in on}
        assert list(on.values()) == pytest.approx([went[step] for step in on], rel=0.02), precision
