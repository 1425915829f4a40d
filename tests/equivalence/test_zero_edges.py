"""Sharding where a person does the unusual: refused with words, or as in the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain
import pytest
import sharded
import torch
from torch import nn

import powertrain
from powertrain.errors import ParameterFreed, PrecisionError, ShardingError


class Scaled(nn.Module):
    """Towers without idle parameters, one of which a batch takes, and a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = plain.FEATURES
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.towers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, plain.CLASSES)

    def forward(self, x: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        for tower in [*self.towers[:-1], self.towers[2]] if int(taken[0]) else self.towers[:-1]:
            x = x + torch.tanh(tower(x))
        return self.head(x) * self.scale


def batch(rank: int, world: int, taken: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs, targets = plain.piece(plain.make_data(), rank, world)
    return inputs, torch.full((len(inputs),), taken), targets


def make(config: dict[str, Any], **more: Any) -> powertrain.Engine:
    return powertrain.initialize(Scaled(), config, loss_fn=nn.CrossEntropyLoss(), **more)


def resumed(config: dict[str, Any], directory: str) -> list[Any]:
    """Train, save and train on; then load into another engine and train on the same."""
    results = []
    for load in (False, True):
        with make(config) as engine:
            mine = batch(engine.data_rank, engine.data_size, 1)
            if load:
                engine.load_checkpoint(directory)
            while engine.global_step < 4:
                engine.train_step(mine)
                if engine.global_step == 2 and not load:
                    engine.save_checkpoint(directory)
            results.append(sharded.slices(engine))
    return results


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "bf16", "compute": "bf16"}], ids=["fp32", "bf16 state"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_parameter_without_dimensions_resumes(
    ranks: Any, tmp_path: Path, stage: int, optimizer: dict[str, str]
) -> None:
    """A 0-d parameter's moments are not taken for step counts: the resumed run has the same bits."""
    config = {"zero": {"stage": stage}, "precision": optimizer}
    for first, second in ranks(2, resumed, config, str(tmp_path)):
        assert plain.same_bits({s[0]: s[3] for s in first}, {s[0]: s[3] for s in second})


def dropped(config: dict[str, Any]) -> sharded.Slices:
    """Go backward through another tower on each rank, drop it all, then train."""
    with make(config) as engine:
        rank, world = engine.data_rank, engine.data_size
        engine.backward(engine.loss(batch(rank, world, rank % 2)))
        for _ in range(2):
            engine.train_step(batch(rank, world, rank % 2))  # forgets what the finer calls left
        return sharded.slices(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_dropped_leaves_nobody_waiting(ranks: Any, stage: int) -> None:
    """Ranks that took different branches have sent different reductions when gradients are dropped; all meet again."""
    config = {"zero": {"stage": stage, "bucket": 100}, "optimizer": {"name": "sgd", "lr": 0.1}}
    mine = sharded.parameters(ranks(2, dropped, config))
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            x, taken, y = batch(rank, 2, rank)
            (nn.functional.cross_entropy(model(x, taken), y) / 2).backward()
        optimizer.step()
    assert plain.difference(mine, {n: p.detach() for n, p in model.named_parameters()}) <= 1e-6


def surprises(stage: int) -> list[str]:
    """Do what cannot work after the engine is built; return what is said."""
    said = []
    model = Scaled()
    model.towers[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = powertrain.initialize(
        model, {"zero": {"stage": stage}}, loss_fn=nn.CrossEntropyLoss(), optimizer=optimizer
    )
    mine = batch(engine.data_rank, engine.data_size, 1)
    extra = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [extra]})
    try:
        engine.train_step(mine)
    except ShardingError as error:
        said.append(str(error))
    optimizer.param_groups.pop()
    model.towers[0].requires_grad_(True)
    try:
        engine.train_step(mine)
    except ShardingError as error:
        said.append(str(error))
    model.towers[0].requires_grad_(False)
    engine.train_step(mine)
    engine.close()
    if stage == 3:
        try:
            model.state_dict()
        except ParameterFreed as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("stage", [2, 3])
def test_what_sharding_cannot_follow_is_refused(ranks: Any, stage: int) -> None:
    """Groups added later, parameters unfrozen later and a model whose engine is closed: errors that say so."""
    for said in ranks(2, surprises, stage):
        assert "groups were changed" in said[0]
        assert "towers.0.weight" in said[1]
        assert "requires a gradient now" in said[1]
        assert stage < 3 or "its engine is closed" in said[2]


def test_state_in_another_format_needs_an_update_by_element() -> None:
    """bf16 state of an optimizer that needs whole matrices is refused, not left in fp32 in silence."""
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.Adafactor(model.parameters())
    with pytest.raises(PrecisionError, match="Adafactor"):
        powertrain.initialize(model, {"zero": {"stage": 1}, "precision": {"optimizer": "bf16"}}, optimizer=optimizer)


def shown_gradient(accumulate: str) -> float:
    """Return the norm of the gradients that ``powertrain.state`` shows after a clipped, scaled step."""
    precision = {"compute": "fp32", "accumulate": accumulate, "loss_scale": 1024.0}
    with make({"zero": {"stage": 2}, "precision": precision, "optimizer": {"clip": 1e-3}}) as engine:
        engine.train_step(batch(engine.data_rank, engine.data_size, 1))
        grads = [powertrain.state(p).grad.full() for p in engine.module.parameters()]  # type: ignore[union-attr]
        return float(nn.utils.get_total_norm([grad.float() for grad in grads]))


@pytest.mark.parametrize("accumulate", ["fp32", "bf16"])
def test_gradients_are_shown_unscaled_and_clipped(ranks: Any, accumulate: str) -> None:
    """Also where they add up in another format than the masters."""
    for norm in ranks(2, shown_gradient, accumulate):
        assert norm == pytest.approx(1e-3, rel=2e-2)


def writes_data() -> str:
    with make({"zero": {"stage": 3, "unit": ["towers.*"]}}) as engine:
        engine.train_step(batch(engine.data_rank, engine.data_size, 1))
        weight = engine.module.towers[0].weight  # type: ignore[index,union-attr]
        try:
            weight.data = torch.zeros(weight.shape)
        except ParameterFreed as error:
            return str(error)
    return "nothing"


def test_replacing_a_freed_parameters_memory_is_an_error(ranks: Any) -> None:
    """``param.data = …`` on a freed parameter would be lost at the next gather."""
    for said in ranks(2, writes_data):
        assert "towers.0.weight" in said
