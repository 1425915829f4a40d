"""The optimizers that torch has not: each against the formulas of its paper, written down plainly in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from powertrain.errors import OptimizerError
from powertrain_cpu.accelerator import CpuAccelerator
from powertrain_optimizers.adam import AdamW
from powertrain_optimizers.adam8bit import Adam8bit, AdamW8bit
from powertrain_optimizers.lamb import Lamb
from powertrain_optimizers.lion import Lion
from powertrain_optimizers.muon import Muon, groups_of, orthogonal
from powertrain_optimizers.onebit_adam import OneBitAdam
from powertrain_optimizers.onebit_lamb import OneBitLamb
from powertrain_optimizers.schedule_free import ScheduleFreeAdamW
from powertrain_optimizers.zero_one_adam import ZeroOneAdam, renews_variance, synchronizes, variance_steps

SHAPES = [(6, 5), (9,), (300, 3)]
STEPS = 9

Tensors = list[torch.Tensor]
Rule = Callable[[int, torch.Tensor, torch.Tensor, dict[str, Any]], None]
kernels = pytest.mark.parametrize("accelerator", [None, CpuAccelerator()], ids=["reference", "kernels"])


def starts() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def grads(step: int) -> Tensors:
    generator = torch.Generator().manual_seed(50 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def ours(kind: Any, accelerator: Any = None, steps: int = STEPS, **options: Any) -> tuple[Tensors, Any]:
    """Take steps with a class; return the parameters and the optimizer."""
    params = [nn.Parameter(value) for value in starts()]
    optimizer = kind(params, **options)
    optimizer.accelerator = accelerator
    for step in range(1, steps + 1):
        for param, grad in zip(params, grads(step), strict=True):
            param.grad = grad
        optimizer.step()
    return [param.detach() for param in params], optimizer


def paper(rule: Rule, steps: int = STEPS) -> Tensors:
    """Take steps by a rule that changes one parameter in place, in fp64."""
    params = [value.double() for value in starts()]
    states: list[dict[str, Any]] = [{} for _ in params]
    for step in range(1, steps + 1):
        for param, grad, state in zip(params, grads(step), states, strict=True):
            rule(step, param, grad.double(), state)
    return params


def same(mine: Tensors, theirs: Tensors, tolerance: float = 3e-6) -> None:
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def moments(state: dict[str, Any], grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Adam's moments after a gradient, with 0.9 and 0.99."""
    state["m"] = 0.9 * state.get("m", torch.zeros_like(grad)) + 0.1 * grad
    state["v"] = 0.99 * state.get("v", torch.zeros_like(grad)) + 0.01 * grad * grad
    return state["m"], state["v"]


@kernels
def test_lion(accelerator: Any) -> None:
    """The sign of a blend of momentum and gradient, decoupled decay, then the momentum."""

    def rule(step: int, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any]) -> None:
        m = state.setdefault("m", torch.zeros_like(p))
        p.copy_(p - 0.01 * (torch.sign(0.9 * m + 0.1 * g) + 0.2 * p))
        state["m"] = 0.98 * m + 0.02 * g

    mine, _ = ours(Lion, accelerator, lr=0.01, betas=(0.9, 0.98), weight_decay=0.2)
    same(mine, paper(rule))


def lamb_ratio(p: torch.Tensor, direction: torch.Tensor, smallest: float, largest: float) -> float:
    length, other = float(p.norm()), float(direction.norm())
    return min(max(length / other, smallest), largest) if length and other else 1.0


@kernels
@pytest.mark.parametrize("limits", [(0.0, 10.0), (0.9, 1.1)])
def test_lamb(accelerator: Any, limits: tuple[float, float]) -> None:
    """Adam's direction with the decay in it, as long as the parameter."""

    def rule(step: int, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any]) -> None:
        m, v = moments(state, g)
        direction = (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-6) + 0.1 * p
        p.sub_(0.02 * lamb_ratio(p, direction, *limits) * direction)

    smallest, largest = limits
    mine, _ = ours(
        Lamb, accelerator, lr=0.02, betas=(0.9, 0.99), weight_decay=0.1, min_ratio=smallest, max_ratio=largest
    )
    same(mine, paper(rule), 1e-5)


def test_lamb_of_nothing() -> None:
    """A parameter of zeros moves as Adam would; one without a direction stays."""
    zeros, still = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
    zeros.grad, still.grad = torch.ones(4), torch.zeros(4)
    Lamb([zeros, still], lr=0.1).step()
    torch.testing.assert_close(zeros.detach(), torch.full((4,), -0.1), rtol=1e-4, atol=0)
    assert torch.equal(still.detach(), torch.ones(4))


@kernels
def test_onebit_adam(accelerator: Any) -> None:
    """AdamW up to the freeze step; then the variance stays, with the correction that it had."""

    def rule(step: int, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any]) -> None:
        old = state.get("v")
        m, v = moments(state, g)
        if step > 4:
            v = state["v"] = old
        root = (v / (1 - 0.99 ** min(step, 4))).sqrt()
        p.copy_(p - 0.01 * (0.1 * p) - 0.01 * (m / (1 - 0.9**step)) / (root + 1e-8))

    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    mine, optimizer = ours(OneBitAdam, accelerator, **options, freeze_step=4)
    same(mine, paper(rule))
    assert optimizer.reducer == "onebit"
    warm, before = ours(OneBitAdam, accelerator, **options, freeze_step=STEPS + 1)
    same(warm, [value.double() for value in ours(AdamW, accelerator, **options)[0]], 1e-7)
    assert before.reducer is None


def test_schedules_of_zero_one_adam() -> None:
    """The variance is renewed 3 times at each distance, 1, 2, 4 …; synchronizations move apart up to a limit."""
    steps = [step for step in range(1, 30) if renews_variance(step, 3)]
    assert steps == [1, 2, 3, 4, 6, 8, 10, 14, 18, 22]
    assert [variance_steps(step, 3) for step in steps] == list(range(1, len(steps) + 1))
    assert variance_steps(17, 3) == 8
    group = {"local_step_scaler": 4, "local_step_clipper": 2}
    assert [step for step in range(1, 13) if synchronizes(step, group)] == [1, 2, 3, 4, 6, 8, 10, 12]


def test_zero_one_adam() -> None:
    """The paper's updates, for ranks that all have the mean gradient."""
    freeze, group = 3, {"local_step_scaler": 2, "local_step_clipper": 4}

    def rule(step: int, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any]) -> None:
        old = state.get("v")
        m, v = moments(state, g)
        if step > freeze or step not in (1, 2):  # two at distance 1, then distance 2: steps 1, 2, 3, 5 …
            v = state["v"] = old if step != 3 else v
        count = min(step, 3)
        p.mul_(1 - 0.01 * 0.1)
        p.sub_(0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**count)).sqrt() + 1e-8))
        if step > freeze:
            state.setdefault("u", []).append(m)
            if synchronizes(step - freeze, group):
                state["m"] = sum(state["u"]) / len(state["u"])
                state["u"] = []

    mine, optimizer = ours(
        ZeroOneAdam, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, var_freeze_step=freeze, var_update_scaler=2, **group
    )
    same(mine, paper(rule))
    assert optimizer.reducer == "onebit"


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_onebit_lamb(decay: float) -> None:
    """LAMB up to the freeze step; then the average ratio, times a factor that follows the variance within limits."""
    freeze = 4

    def rule(step: int, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any]) -> None:
        frozen = state.get("frozen")
        m, v = moments(state, g)
        fresh = (v / (1 - 0.99**step)).sqrt() + 1e-6
        if step == freeze:
            state["frozen"] = fresh
        bottom = frozen if step > freeze else fresh
        bare = (m / (1 - 0.9**step)) / bottom
        direction = bare + decay * p
        if step <= freeze:
            ratio = lamb_ratio(p, direction, 0.01, 10.0)
            state["ratio"] = 0.5 * state.get("ratio", 0.0) + 0.5 * ratio
        else:
            factor = float((frozen / fresh).max())
            share = min(1.0, float(bare.norm() / direction.norm()))
            factor = factor * share + 1 - share
            last = state.get("factor", 1.0)
            factor = min(max(min(max(factor, 0.5), 4.0), last * 0.95), last * 1.05)
            state["factor"] = factor
            ratio = state["ratio"] / (1 - 0.5**freeze) * factor
        p.sub_(0.02 * ratio * direction)

    mine, optimizer = ours(
        OneBitLamb,
        lr=0.02,
        betas=(0.9, 0.99),
        weight_decay=decay,
        freeze_step=freeze,
        coeff_beta=0.5,
        factor_threshold=0.05,
    )
    same(mine, paper(rule), 1e-5)
    assert optimizer.reducer == "onebit"
    warm, before = ours(OneBitLamb, lr=0.02, weight_decay=decay, freeze_step=99, min_ratio=0.0)
    same(warm, [value.double() for value in ours(Lamb, lr=0.02, weight_decay=decay)[0]], 1e-6)
    assert before.reducer is None


def test_schedule_free() -> None:
    """x averages z with growing weights, y lies between them, and gradients belong to y."""
    final: Tensors = []

    def rule(step: int, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any]) -> None:
        z, x = state.setdefault("z", p.clone()), state.setdefault("x", p.clone())
        lr = 0.02 * min(1.0, step / 3)
        _, v = moments(state, g)
        move = g / ((v / (1 - 0.99**step)).sqrt() + 1e-8) + 0.1 * p
        z.sub_(lr * move)
        state["weights"] = state.get("weights", 0.0) + lr**2
        share = lr**2 / state["weights"]
        x.copy_((1 - share) * x + share * z)
        p.copy_(0.1 * z + 0.9 * x)
        if step == STEPS:
            final.append(x.clone())

    options = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1, "warmup_steps": 3}
    mine, optimizer = ours(ScheduleFreeAdamW, **options)
    y = paper(rule)
    same(mine, y)
    optimizer.eval()
    optimizer.eval()  # twice is once
    same(mine, final)
    with pytest.raises(OptimizerError, match="hold the average") as caught:
        optimizer.step()
    assert "train()" in str(caught.value)
    saved = optimizer.state_dict()
    again = ScheduleFreeAdamW([nn.Parameter(value.clone()) for value in mine], **options)
    again.load_state_dict(saved)  # knows that it holds x
    for param in again.param_groups[0]["params"]:
        param.grad = torch.zeros_like(param)
    with pytest.raises(OptimizerError, match="hold the average"):
        again.step()
    again.train()
    same([param.detach() for param in again.param_groups[0]["params"]], y)
    optimizer.train()
    same(mine, y)
    again.load_state_dict(optimizer.state_dict())  # and that it holds y
    again.train()
    same([param.detach() for param in again.param_groups[0]["params"]], y)


def test_schedule_free_averages_are_better() -> None:
    """At a rate that keeps the iterates jumping, the average is nearer to the minimum."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.full((50,), 3.0))
    optimizer = ScheduleFreeAdamW([param], lr=0.3)
    for _ in range(200):
        param.grad = 2 * param.detach() + torch.randn(50)
        optimizer.step()
    distance = float(optimizer.state[param]["z"].norm())
    optimizer.eval()
    assert float(param.detach().norm()) < distance / 2


@kernels
@pytest.mark.parametrize("kind", [Adam8bit, AdamW8bit])
def test_8bit_moments(accelerator: Any, kind: Any) -> None:
    """Near Adam with exact moments; a quarter of the bytes of state, the scales included."""
    exact = kind.__mro__[1] if kind is Adam8bit else AdamW
    mine, optimizer = ours(kind, accelerator, steps=20, lr=0.01)
    theirs, _ = ours(exact, accelerator, steps=20, lr=0.01)
    moved = torch.cat([(after - before).flatten() for after, before in zip(theirs, starts(), strict=True)])
    apart = torch.cat([(one - other).flatten() for one, other in zip(mine, theirs, strict=True)])
    assert apart.norm() < 0.02 * moved.norm()
    param = optimizer.param_groups[0]["params"][2]
    kept = sum(value.numel() * value.element_size() for key, value in optimizer.state[param].items() if key != "step")
    assert kept == 2 * param.numel() + 2 * 4 * math.ceil(param.numel() / 256)


def test_muon_makes_matrices_orthogonal() -> None:
    """Singular values that span a thousandfold come near 1; their vectors stay."""
    torch.manual_seed(3)
    for shape in ((20, 8), (8, 20)):
        left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        matrix = left @ torch.diag(torch.logspace(-2, 0, 8)) @ right
        found = orthogonal(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7, torch.float32)
        inner = left.T @ found @ right.T
        assert torch.diag(inner).min() > 0.5 and torch.diag(inner).max() < 1.3
        assert (inner - torch.diag(torch.diag(inner))).abs().max() < 1e-4


def test_muon_leaves_the_rest_to_adamw() -> None:
    """Vectors, and matrices whose names say embedding or head, are AdamW's, with a rate of their own."""
    model = nn.ModuleDict(
        {"embed": nn.Embedding(6, 4), "hidden": nn.Linear(4, 4), "conv": nn.Conv1d(2, 2, 2), "head": nn.Linear(4, 3)}
    )
    named = list(model.named_parameters())
    made = groups_of(named, ["*embed*", "head.*"], lr=0.05)
    assert [[name for name, param in named if any(param is p for p in group["params"])] for group in made] == [
        ["hidden.weight"],
        ["embed.weight", "hidden.bias", "conv.weight", "conv.bias", "head.weight", "head.bias"],
    ]
    optimizer = Muon(made, lr=0.5, weight_decay=0.1)
    twin = {name: nn.Parameter(param.detach().clone()) for name, param in named}
    theirs = AdamW([p for n, p in twin.items() if n != "hidden.weight"], lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        for name, param in named:
            param.grad = torch.randn_like(param)
            twin[name].grad = param.grad.clone()
        optimizer.step()
        theirs.step()
    for name, param in named:
        assert torch.equal(param, twin[name]) == (name != "hidden.weight")
    assert optimizer.needs_whole(optimizer.param_groups[0], named[1][1])
    assert not optimizer.needs_whole(optimizer.param_groups[1], named[0][1])


def test_muon_of_what_is_no_matrix() -> None:
    """A convolution is a matrix if its group says so; a vector cannot be."""
    conv, flat = nn.Parameter(torch.randn(3, 2, 2)), nn.Parameter(torch.randn(3, 4))
    flat.data.copy_(conv.detach().view(3, 4))
    conv.grad = torch.randn(3, 2, 2)
    flat.grad = conv.grad.view(3, 4)
    Muon([{"params": [conv], "use_muon": True}], lr=0.1).step()
    Muon([flat], lr=0.1).step()
    assert torch.equal(conv.view(3, 4), flat)
    vector = nn.Parameter(torch.ones(3))
    vector.grad = torch.ones(3)
    with pytest.raises(OptimizerError, match="no matrix") as caught:
        Muon([{"params": [vector], "use_muon": True}]).step()
    assert caught.value.found == "a parameter of shape (3,)"


@pytest.mark.parametrize("kind", [Muon, Adam8bit])
def test_complex_parameters_are_refused(kind: Any) -> None:
    """Where a rule means nothing for complex numbers, it says so."""
    param = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    with pytest.raises(OptimizerError, match="complex"):
        kind([param]).step()
