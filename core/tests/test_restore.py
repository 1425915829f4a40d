"""What an engine takes from a checkpoint, and what it refuses before anything changes."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import powertrain
from powertrain import saved
from powertrain.errors import CheckpointError, CheckpointMismatch


class Net(nn.Module):
    """One layer and a buffer; returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * self.scale).square().mean()


def batch() -> torch.Tensor:
    return torch.arange(12, dtype=torch.float32).view(4, 3) / 10


def start(config: dict[str, Any] | None = None, **arguments: Any) -> powertrain.Engine:
    torch.manual_seed(1)
    return powertrain.initialize(Net(), config, **arguments)


def weights(engine: powertrain.Engine) -> list[torch.Tensor]:
    return [value.detach().clone() for value in engine.module.state_dict().values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_schedule_of_another_kind_loads_nothing(tmp_path: Path) -> None:
    """A torch scheduler refuses a checkpoint made without it before anything changes; a closed form continues."""
    with start() as engine:
        for _ in range(3):
            engine.train_step(batch())
        engine.save_checkpoint(str(tmp_path))
    with start(scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2)) as engine:
        before = weights(engine)
        with pytest.raises(CheckpointMismatch, match="made with another schedule"):
            engine.load_checkpoint(str(tmp_path))
        assert same(weights(engine), before)
        assert engine.global_step == 0
    table = {"optimizer": {"lr": 0.1}, "scheduler": {"name": "linear", "steps": 10}}
    with start(table) as engine:
        engine.load_checkpoint(str(tmp_path))
        assert engine.learning_rate == pytest.approx(0.1 * 0.7)


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20),
        partial(torch.optim.lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=4),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
@pytest.mark.parametrize(
    "table", [{"name": "sgd", "lr": 0.1, "momentum": 0.9}, {"name": "adamw"}], ids=["sgd", "adamw"]
)
def test_a_cycled_momentum_goes_on(tmp_path: Path, table: dict[str, Any], scheduler: Any) -> None:
    """Schedulers that cycle momentum or betas resume bit-equal, also when saved again at once."""
    config = {"optimizer": table}
    with start(config, scheduler=scheduler) as engine:
        for _ in range(3):
            engine.train_step(batch())
        engine.save_checkpoint(str(tmp_path / "first"))
        engine.train_step(batch())
        expected = weights(engine)
    with start(config, scheduler=scheduler) as engine:
        engine.load_checkpoint(str(tmp_path / "first"))
        engine.save_checkpoint(str(tmp_path / "second"))
    with start(config, scheduler=scheduler) as engine:
        engine.load_checkpoint(str(tmp_path / "second"))
        engine.train_step(batch())
        assert same(weights(engine), expected)


@pytest.mark.parametrize(
    ("first", "second"), [("adamw", "sgd"), ("torch.optim.Adadelta", "adamw"), ("adamw", "torch.optim.Adadelta")]
)
def test_another_optimizer_loads_nothing(tmp_path: Path, first: str, second: str) -> None:
    """State of another optimizer is refused before anything changes, with the name to set."""
    with start({"optimizer": {"name": first, "lr": 0.1}}) as engine:
        engine.train_step(batch())
        engine.save_checkpoint(str(tmp_path))
    with start({"optimizer": {"name": second, "lr": 0.1}}) as engine:
        before = weights(engine)
        with pytest.raises(CheckpointMismatch, match="made with another optimizer") as caught:
            engine.load_checkpoint(str(tmp_path))
        assert same(weights(engine), before)
        assert not engine.optimizer_wrapper.optimizer.state
    named = {"optimizer": {"name": caught.value.expected, "lr": 0.1}}
    assert f'name = "{caught.value.expected}"' in caught.value.remedy
    with start(named) as engine:
        assert engine.load_checkpoint(str(tmp_path)).fresh == []


def test_another_number_of_groups_loads_nothing(tmp_path: Path) -> None:
    """Learning rates go by group: a checkpoint of two groups is not taken for one of one."""

    def grouped(parts: int) -> Any:
        return lambda params: torch.optim.SGD([{"params": [p], "lr": 0.1} for p in params][:parts], lr=0.1)

    with start(optimizer=grouped(2)) as engine:
        engine.train_step(batch())
        engine.save_checkpoint(str(tmp_path))
    with start(optimizer=grouped(1)) as engine:
        before = weights(engine)
        with pytest.raises(CheckpointMismatch, match="another number of parameter groups") as caught:
            engine.load_checkpoint(str(tmp_path))
        assert (caught.value.expected, caught.value.found) == ("2 groups", "1 groups")
        assert same(weights(engine), before)


def torn_by(engine: powertrain.Engine) -> tuple[list[torch.Tensor], list[Any]]:
    """Return all that a load that failed could leave half changed."""
    optimizer = engine.optimizer_wrapper.optimizer
    tensors = [*weights(engine), torch.get_rng_state()]
    plain: list[Any] = [engine.global_step, engine.loader.sampler.state(), random.getstate(), engine.client_state]
    plain += [engine.loss_scale.state(), engine.learning_rate, engine.schedule.state()]
    for moments in optimizer.state.values():
        tensors += [value.clone() for value in moments.values()]
    return tensors, plain


@pytest.mark.parametrize("failing", [1, 2])
def test_a_read_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Whichever read of a load fails, weights, moments, generators, position and step are as before."""
    config = {"batch": {"micro": 2}, "scheduler": {"name": "cosine", "steps": 9}, "precision": {"loss_scale": 2.0}}
    data = TensorDataset(torch.randn(12, 3))
    with start(config, dataset=data) as engine:
        for one in engine.loader:
            engine.train_step(one)
        engine.save_checkpoint(str(tmp_path), client_state={"a": 1})
    with start(config, dataset=data) as engine:
        engine.train_step(next(iter(engine.loader)))
        store = saved.open_store(engine.context, str(tmp_path))
        reader, calls = store.open(), []
        read = reader.read

        def fails(slices: Any) -> None:
            calls.append(slices)
            if len(calls) == failing:
                raise CheckpointError("the disk is gone")
            read(slices)

        monkeypatch.setattr(reader, "read", fails)
        tensors, plain = torn_by(engine)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            saved.restore(engine, reader)
        after, plain_after = torn_by(engine)
        assert len(after) == len(tensors)
        assert same(after, tensors)
        assert plain_after == plain
        monkeypatch.undo()
        assert saved.restore(engine, reader).step == 6


def test_automatic_saves_carry_the_client_state_on(tmp_path: Path) -> None:
    """What a load found is saved again where the caller gives nothing; an empty dict clears it."""
    config = {"checkpoint": {"directory": str(tmp_path), "every": 1}}
    with start(config) as engine:
        engine.save_checkpoint(tag="first", client_state={"best": 3})
    with start(config) as engine:
        engine.load_checkpoint()
        engine.train_step(batch())
    with start(config) as engine:
        assert engine.load_checkpoint().client_state == {"best": 3}
        engine.save_checkpoint(tag="last", client_state={})
        assert engine.load_checkpoint(tag="last").client_state == {}


def test_another_number_of_groups_is_refused(tmp_path: Path) -> None:
    """A torch scheduler's state for other parameter groups is refused before anything changes."""
    step = partial(torch.optim.lr_scheduler.StepLR, step_size=2)

    def groups(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [param]} for param in params], lr=0.1)

    with start(optimizer=groups, scheduler=step) as engine:
        engine.train_step(batch())
        engine.save_checkpoint(str(tmp_path))
    with start({"optimizer": {"name": "sgd", "lr": 0.1}}, scheduler=step) as engine:
        before = weights(engine)
        with pytest.raises(CheckpointMismatch, match="another number of parameter groups") as caught:
            engine.load_checkpoint(str(tmp_path))
        assert (caught.value.expected, caught.value.found) == ("2 groups", "1 groups")
        assert same(weights(engine), before)


def test_a_closed_form_counts_applied_updates_only(tmp_path: Path) -> None:
    """Steps skipped for an overflow move the schedule neither in the first run nor after a load."""
    table = {"scheduler": {"name": "linear", "steps": 10}, "optimizer": {"lr": 0.1}, "precision": {"loss_scale": 2.0}}
    with start(table) as engine:
        engine.train_step(batch())
        engine.train_step(batch() * float("inf"))
        engine.train_step(batch())
        assert (engine.global_step, engine.skipped_steps) == (3, 1)
        engine.save_checkpoint(str(tmp_path))
        rate = engine.learning_rate
    with start(table) as engine:
        engine.load_checkpoint(str(tmp_path))
        assert engine.learning_rate == rate == pytest.approx(0.1 * 0.8)
