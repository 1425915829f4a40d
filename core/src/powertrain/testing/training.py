"""Trains a small model twice: as a plain PyTorch loop, and through an optimizer wrapper on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import torch

from powertrain.kernels.updates import Operands, adam
from powertrain.roles.checkpoint import Snapshot
from powertrain.roles.optimizer import FlatOptimizer, OptimizerWrapper, Update
from powertrain.testing.memory_store import MemoryReader

MICRO = 2
Parameters = dict[str, torch.Tensor]


class Branches(torch.nn.Module):
    """A small network: a frozen layer, a branch that only some samples take, and one that none takes."""

    def __init__(self, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = torch.nn.Linear(6, width)
        self.frozen = torch.nn.Linear(width, width).requires_grad_(False)
        self.branch = torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, 1)
        self.never = torch.nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor, branch: bool = True) -> torch.Tensor:
        """Return one number a sample."""
        hidden = self.frozen(self.body(inputs).tanh())
        hidden = self.branch(hidden) if branch else hidden
        result: torch.Tensor = self.head(hidden)
        return result


@attrs.frozen(kw_only=True)
class Recipe:
    """How a comparison runs.

    Attributes:
        ranks: the number of data ranks.
        accumulation: micro-batches in a step.
        steps: optimizer steps.
        optimizer: makes the optimizer of some parameters.
        clip: the largest gradient norm.
        scale: the factor on the loss.
        overflow: the step in which the last rank's loss is infinite.
        branch: whether micro-batch ``index`` of the global batch takes the branch.
    """

    ranks: int = 1
    accumulation: int = 1
    steps: int = 4
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)
    clip: float | None = None
    scale: float = 1.0
    overflow: int | None = None
    branch: Callable[[int], bool] = lambda index: True


def adamw(params: Any) -> torch.optim.Optimizer:
    """Return the optimizer that reacts to everything: moments, decay, a step count."""
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, eps=1e-3)


class FlatAdamW(FlatOptimizer):
    """AdamW as a ``FlatOptimizer``: scales, and casts into ``request.outs``, on its way."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params`` one by one."""
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros(())
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros_like(param, dtype=self.format_of(key, param))
            state["step"] += 1
            out = self.request.outs.get(param)
            operands = Operands(
                params=[param.detach()],
                grads=[self.grad_of(param)],
                firsts=[state["exp_avg"]],
                seconds=[state["exp_avg_sq"]],
                outs=[] if out is None else [out],
            )
            adam(
                operands, step=int(state["step"]), lr=group["lr"], beta1=0.9, beta2=0.999, eps=1e-3, weight_decay=0.1,
                decoupled=True, scale=self.request.scale,
            )  # fmt: skip


def flat_adamw(params: Any) -> torch.optim.Optimizer:
    """Return the same optimizer as ``adamw``, as one that wrappers ask for more."""
    return FlatAdamW(params)


def micro_batch(step: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of micro-batch ``index`` of a step's global batch."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(MICRO, 6, generator=generator), torch.randn(MICRO, 1, generator=generator)


def loss_of(model: torch.nn.Module, step: int, index: int, recipe: Recipe) -> torch.Tensor:
    """Return the mean loss of one micro-batch."""
    inputs, targets = micro_batch(step, index)
    # In low precision the engine casts what goes in.
    outputs = model(inputs.to(model.get_parameter("head.bias").dtype), recipe.branch(index))
    return torch.nn.functional.mse_loss(outputs.float(), targets)


@attrs.frozen(kw_only=True)
class Plain:
    """A plain loop, step by step: the parameters after it, its gradients and their norm, each micro-batch's loss."""

    parameters: list[Parameters] = attrs.field(factory=list)
    gradients: list[Parameters] = attrs.field(factory=list)
    norms: list[float] = attrs.field(factory=list)
    losses: list[list[float]] = attrs.field(factory=list)


def plain(recipe: Recipe, edit: Callable[[torch.nn.Module, torch.optim.Optimizer, int], None] | None = None) -> Plain:
    """Run the recipe as a plain loop over global batches; ``edit(model, optimizer, step)`` follows each step."""
    model = Branches()
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = recipe.optimizer(trainable)
    count = recipe.ranks * recipe.accumulation
    result = Plain()
    for step in range(recipe.steps):
        optimizer.zero_grad()
        losses = torch.stack([loss_of(model, step, index, recipe) for index in range(count)])
        losses.mean().backward()
        grads = [param.grad for param in trainable if param.grad is not None]
        result.losses.append(losses.tolist())
        result.norms.append(float(torch.nn.utils.get_total_norm(grads)))
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable, recipe.clip)
        if step != recipe.overflow:
            optimizer.step()
        named = dict(model.named_parameters())
        result.parameters.append({name: param.detach().clone() for name, param in named.items()})
        result.gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        if edit is not None:
            edit(model, optimizer, step)
    return result


def close_to(found: Parameters, expected: Parameters) -> None:
    """Assert that parameters agree to the rounding of fp32."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=partial("{}: {}".format, name))


@attrs.frozen(kw_only=True)
class Trace:
    """What a run did, step by step.

    Attributes:
        losses: the mean loss of each micro-batch.
        norms: the global gradient norm.
        applied: whether the update was applied.
        states: this rank's part of the state after the step.
    """

    losses: list[float] = attrs.field(factory=list)
    norms: list[float] = attrs.field(factory=list)
    applied: list[bool] = attrs.field(factory=list)
    states: list[Snapshot] = attrs.field(factory=list)


@attrs.frozen
class Rig:
    """One rank of a comparison: a model, its wrapper, and what drives them."""

    model: torch.nn.Module
    wrapper: OptimizerWrapper
    rank: int
    recipe: Recipe
    trace: Trace = attrs.field(factory=Trace)

    def accumulate(self, step: int) -> None:
        """Run this rank's micro-batches of one step."""
        recipe = self.recipe
        for k in range(recipe.accumulation):
            self.wrapper.begin(last=k == recipe.accumulation - 1)
            loss = loss_of(self.model, step, self.rank * recipe.accumulation + k, recipe)
            self.trace.losses.append(loss.item())
            if step == recipe.overflow and self.rank == recipe.ranks - 1:
                loss = loss * float("inf")
            (loss * recipe.scale / recipe.accumulation).backward()

    def update(self) -> Update:
        """End the step."""
        check = self.recipe.overflow is not None
        return self.wrapper.step(grad_scale=self.recipe.scale, clip=self.recipe.clip, check_overflow=check)

    def train(self, steps: Sequence[int]) -> Trace:
        """Run whole steps."""
        for step in steps:
            self.accumulate(step)
            update = self.update()
            self.trace.norms.append(float(update.grad_norm()))
            self.trace.applied.append(update.applied)
            self.trace.states.append(self.state())
        return self.trace

    def state(self) -> Snapshot:
        """Return a copy of what this rank would save."""
        tensors = [attrs.evolve(piece, tensor=piece.tensor.clone()) for piece in self.wrapper.tensors()]
        return Snapshot(tensors=tensors, values={"optimizer": self.wrapper.values()}, rank_values={})


def whole(states: Sequence[Snapshot]) -> MemoryReader:
    """Put the parts of all ranks together."""
    return MemoryReader("state", states)


def parameters_of(reader: MemoryReader) -> Parameters:
    """Return the model's part of a state."""
    return {name[6:]: tensor for name, tensor in reader.whole.items() if name.startswith("model/")}


def first_half(index: int) -> bool:
    """Take the branch in the first micro-batch only: on one rank, and not in its last micro-batch."""
    return index == 0


def check(expected: Plain, traces: list[Trace], recipe: Recipe) -> None:
    """Assert that what the ranks did is what the plain loop did."""
    share = recipe.accumulation
    for rank, trace in enumerate(traces):
        assert trace.applied == [step != recipe.overflow for step in range(recipe.steps)]
        wanted = [loss for losses in expected.losses for loss in losses[rank * share : (rank + 1) * share]]
        assert trace.losses == pytest.approx(wanted, rel=1e-4), f"losses on rank {rank}"
        for step in range(recipe.steps):
            if step != recipe.overflow:
                assert trace.norms[step] == pytest.approx(expected.norms[step], rel=1e-4), f"norm of step {step}"
    for step in range(recipe.steps):
        close_to(parameters_of(whole([trace.states[step] for trace in traces])), expected.parameters[step])
