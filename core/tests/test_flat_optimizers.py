"""Optimizers that scale, update and cast in one pass, under an engine and by themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import powertrain
from powertrain.errors import PrecisionError
from powertrain.kernels import reference
from powertrain.kernels.updates import Operands
from powertrain.optimizers import name_of
from powertrain.roles.optimizer import (
    FlatOptimizer,
    Request,
    blocks_of,
    clip_factor,
    takes_pieces,
    whole_parameters,
)
from powertrain.testing.training import FlatAdamW


class Listed(FlatAdamW):
    """Remembers what it was asked."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.asked_for: list[Request] = []

    def update(self, group: dict[str, Any], params: Any) -> None:
        self.asked_for.append(self.request)
        super().update(group, params)


def start(config: dict[str, Any] | None = None, kind: Any = Listed, **more: Any) -> powertrain.Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    return powertrain.initialize(model, config or {}, loss_fn=nn.functional.mse_loss, optimizer=kind, **more)


def batch(factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=generator) * factor, torch.ones(8, 1)


def asked(engine: powertrain.Engine) -> Request:
    """Return what the last update was asked for."""
    optimizer = engine.optimizer_wrapper.optimizer
    assert isinstance(optimizer, Listed)
    return optimizer.asked_for[-1]


def torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, eps=1e-3)


def test_clipping_is_one_number_of_the_pass() -> None:
    """Nothing multiplies gradients before the update; what it multiplies by is what clip_grad_norm_ would."""
    with start({"optimizer": {"clip": 0.1}}) as engine:
        for micro in (batch(), batch(3.0)):
            engine.train_step(micro)
            raw = torch.cat([param.grad.flatten() for param in engine.module.parameters()])
            assert float(raw.norm()) == pytest.approx(engine.grad_norm)
            scale = asked(engine).scale
            assert float(scale) == pytest.approx(0.1 / (float(raw.norm()) + 1e-6), rel=1e-6)
            first = next(engine.module.parameters())
            shown = powertrain.state(first).grad.full()  # from now on, gradients are what the update used
            assert shown is not None
            seen = torch.cat([param.grad.flatten() for param in engine.module.parameters()])
            torch.testing.assert_close(seen, raw * scale)
            torch.testing.assert_close(shown, first.grad)
            twice = powertrain.state(first).grad.full()
            torch.testing.assert_close(twice, first.grad)
            assert float(seen.norm()) == pytest.approx(0.1, rel=1e-4)
    norm = torch.tensor(3.0)
    assert float(clip_factor(norm, 5.0)) == 1.0


def test_it_is_torchs_clipping() -> None:
    """Clipped or not, steps lead to where torch's AdamW and clip_grad_norm_ lead."""
    for config in ({}, {"optimizer": {"clip": 0.1}}, {"precision": {"compute": "bf16"}, "optimizer": {"clip": 0.1}}):
        with start(config) as mine, start(config, torchs) as theirs:
            for _ in range(4):
                mine.train_step(batch())
                theirs.train_step(batch())
            for one, other in zip(mine.module.parameters(), theirs.module.parameters(), strict=True):
                torch.testing.assert_close(one, other)


def test_overflows_are_skipped() -> None:
    """With fp16's loss scale, gradients are unscaled in the pass, and a step that overflows updates nothing."""
    config = {"precision": {"compute": "fp16"}, "optimizer": {"clip": 1.0}}
    with start(config) as engine:
        optimizer = engine.optimizer_wrapper.optimizer
        assert isinstance(optimizer, Listed)
        while not optimizer.asked_for:  # the first scale is too large
            engine.train_step(batch())
        scale, skipped = engine.loss_scale.value, engine.skipped_steps
        before = [param.detach().clone() for param in engine.module.parameters()]
        calls = len(optimizer.asked_for)
        engine.train_step(batch(1e6))
        assert engine.skipped_steps == skipped + 1
        assert len(optimizer.asked_for) == calls
        assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
        assert optimizer.request == Request() or optimizer.request.scale == 1.0
        for _ in range(3):
            engine.train_step(batch())
        assert float(asked(engine).scale) <= 1.0 / min(scale, engine.loss_scale.value)
        assert engine.grad_norm is not None and engine.grad_norm < 100


def test_a_scheduler_of_torch_does_not_warn() -> None:
    """torch warns where a scheduler steps before its optimizer; warnings are errors here."""
    with start(scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)) as engine:
        for _ in range(3):
            engine.train_step(batch())
        assert engine.learning_rate == pytest.approx(0.01 / 8)


def test_unused_parameters_are_left_out() -> None:
    """A parameter without a gradient is not updated, does not decay and counts no step."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Two()
    idle = model.idle.weight.detach().clone()
    with powertrain.initialize(model, {}, loss_fn=nn.functional.mse_loss, optimizer=FlatAdamW) as engine:
        for _ in range(2):
            engine.train_step(batch())
        state = engine.optimizer_wrapper.optimizer.state
        assert float(state[model.used.weight]["step"]) == 2.0
        assert model.idle.weight not in state
        assert torch.equal(model.idle.weight, idle)


def test_state_may_rest_in_fewer_bits() -> None:
    """[precision] optimizer is the optimizer's own matter; one of torch's is refused where nothing converts for it."""
    config = {"precision": {"compute": "bf16", "optimizer": "bf16"}}
    with start(config) as engine:
        engine.train_step(batch())
        for state in engine.optimizer_wrapper.optimizer.state.values():
            assert (state["exp_avg"].dtype, state["step"].dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(PrecisionError, match="replicated training keeps one format"):
        start(config, torchs)


def test_state_dicts_keep_their_formats() -> None:
    """What rests in another format than the parameters is loaded as it was, which torch's own loading would not do."""

    class Coded(FlatAdamW):
        blocks = {"scale": 2}

        def update(self, group: dict[str, Any], params: Any) -> None:
            super().update(group, params)
            for param in params:
                self.state[param]["codes"] = torch.full_like(param, 7, dtype=torch.uint8)
                self.state[param]["scale"] = torch.ones(2, dtype=torch.float64)

    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    first = Coded([param])
    first.state_dtype = torch.bfloat16
    first.step()
    second = Coded([param])
    second.state_dtype = torch.bfloat16
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for key, value in first.state[param].items():
        assert second.state[param][key].dtype == value.dtype, key
        assert torch.equal(second.state[param][key], value)
    assert blocks_of(second) == {"scale": 2}
    assert blocks_of(torchs([param])) == {}


def test_what_must_come_whole() -> None:
    """All of an optimizer that sees matrices, unless it says less; none of one that takes pieces."""
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))

    class Matrices(FlatAdamW):
        granularity = "matrix"

        def needs_whole(self, group: Any, param: torch.Tensor) -> bool:
            return param.ndim == 2

    class Norms(FlatAdamW):
        granularity = "tensor"

    class Others(torch.optim.SGD):
        granularity = "tensor"

    assert whole_parameters(Matrices([matrix, vector])) == {matrix}
    assert whole_parameters(FlatAdamW([matrix, vector])) == frozenset()
    assert whole_parameters(torch.optim.Adafactor([matrix, vector])) == {matrix, vector}
    assert takes_pieces(Norms([matrix]))
    assert not takes_pieces(Others([matrix])), "it sums over what it sees"


def test_checkpoints_go_by_kind() -> None:
    """An optimizer with a kind is called by it; one without, by the path of its class."""

    class Named(FlatAdamW):
        kind = "adamw"

    param = nn.Parameter(torch.ones(1))
    assert name_of(Named([param])) == name_of(torch.optim.AdamW([param])) == "adamw"
    assert name_of(FlatAdamW([param])) == "powertrain.testing.training.FlatAdamW"


def test_a_factory_may_ask_for_names() -> None:
    """One that says ``named`` is called with the parameters' names."""
    seen: list[str] = []

    class Factory:
        granularity, named = "element", True

        def __call__(self, params: Any) -> FlatOptimizer:
            seen.extend(name for name, _ in params)
            return FlatAdamW([param for _, param in params])

    class NamesPlugin(powertrain.Plugin[powertrain.plugin.NoConfig]):
        name, api = "names", 1

        @powertrain.hookimpl
        def make_optimizer(self, name: str) -> Any:
            return Factory()

    plugin = NamesPlugin(powertrain.plugin.NoConfig())
    with powertrain.initialize(nn.Linear(2, 1), {}, plugins=[plugin]):
        assert seen == ["weight", "bias"]


@pytest.mark.parametrize("name", ["adam", "lion", "adagrad", "momentum", "lamb"])
def test_the_reference_computes_as_wide_as_the_parameter(name: str) -> None:
    """fp64 parameters lose nothing: a step too small for fp32 arithmetic is taken."""
    numbers: dict[str, dict[str, Any]] = {
        "adam": {"step": 1, "lr": 1e-12, "beta1": 0.9, "beta2": 0.99, "eps": 0.0, "weight_decay": 0.0,
                 "decoupled": True},
        "lion": {"lr": 1e-12, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0},
        "adagrad": {"step": 1, "lr": 1e-12, "lr_decay": 0.0, "eps": 0.0, "weight_decay": 0.0},
        "momentum": {"lr": 1e-12, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0,
                     "first_time": True},
        "lamb": {"step": 1, "beta1": 0.9, "beta2": 0.99, "eps": 0.0, "weight_decay": 0.0},
    }  # fmt: skip
    param = torch.ones(2, dtype=torch.float64)
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    operands = Operands([param], [torch.ones_like(param)], [zeros[0]], [zeros[1]])
    if name == "lamb":
        sums = reference("lamb_moments")(operands, **numbers[name])
        assert (sums.dtype, sums.tolist()) == (torch.float64, [[2.0, pytest.approx(2.0)]])
        reference("lamb_apply")(operands, rates=torch.tensor([1e-12], dtype=torch.float64), **numbers[name])
    else:
        reference(name)(operands, **numbers[name])
    assert param.tolist() == pytest.approx([1 - 1e-12] * 2, rel=1e-15)
    assert param[0] != 1
