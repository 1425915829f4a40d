"""Schedule-free AdamW: the average of the iterates takes the place of a schedule that ends somewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from powertrain.errors import OptimizerError
from powertrain_optimizers.base import KernelOptimizer, decays, not_negative, real, widened


class ScheduleFreeAdamW(KernelOptimizer):
    """Schedule-free AdamW (Defazio et al., "The Road Less Scheduled", 2024).

    Of each parameter there are three sequences: z takes AdamW's steps, x is a weighted average of all z, and y, where
    gradients are taken, lies between them. Parameters hold y in training. ``eval()`` makes them x, with which a
    model is evaluated and exported, and ``train()`` y again; ``step`` refuses parameters that are x. A checkpoint
    remembers which of the two it holds. Under an engine, ``evaluating(engine)`` does both.

    Args:
        params: tensors or groups.
        lr: learning rate, a number or a 0-d tensor; it should not decay.
        betas: weight of x in y, and decay of the running average of the squared gradient.
        eps: added to the denominator.
        weight_decay: fraction of y, times ``lr``, that a step takes away.
        warmup_steps: steps over which ``lr`` rises from zero.
        r: steps weigh as their number to this power in the average.
        weight_lr_power: and as the largest ``lr`` so far to this one.
        maximize: climb.

    State: ``step`` (0-d fp32, on the host); ``exp_avg_sq`` and ``z`` (the parameter's shape; ``z`` in its format);
    ``weight_sum``, ``lr_max`` (numbers), ``holds`` ("y" or "x").
    """

    kind = "schedule_free_adamw"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
    ) -> None:
        not_negative(lr=lr, eps=eps, weight_decay=weight_decay, warmup_steps=warmup_steps)
        decays(betas)
        if betas[0] == 0:
            raise ValueError("betas[0] must be above 0: it is the weight of the average in what is trained")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def format_of(self, key: str, param: torch.Tensor) -> torch.dtype:
        """Return the format of state: ``z`` is as exact as the parameter, whatever the moments are."""
        return param.dtype if key == "z" else super().format_of(key, param)

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params``, which hold y.

        Raises:
            OptimizerError: they hold x.
        """
        if any(self.state[param].get("holds") == "x" for param in params):
            raise OptimizerError(
                "parameters hold the average that is evaluated, not what is trained",
                where="optimizer.step",
                expected="train() after eval()",
                remedy="call optimizer.train() before the next step; under an engine the end of `with "
                "evaluating(engine):` does: after loading a checkpoint that was saved within one, enter and leave one",
            )
        beta1, beta2 = group["betas"]
        for step, alike in self.counted(params).items():
            rise = min(1.0, step / group["warmup_steps"]) if group["warmup_steps"] else 1.0
            lr = float(group["lr"]) * rise
            for param in alike:
                share = self._share(group, param, step, lr)
                grad = self.scaled(group, param)
                if "z" not in self.state[param]:
                    self.state[param]["z"] = param.detach().clone()
                with widened(param, self.state[param]["z"], self.entry("exp_avg_sq", param)) as (y, z, v):
                    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                    move = grad.div_((v / (1 - beta2**step)).sqrt_().add_(group["eps"]))
                    move.add_(y, alpha=group["weight_decay"])
                    y.lerp_(z, share).add_(move, alpha=lr * (beta1 * (1 - share) - 1))
                    z.sub_(move, alpha=lr)
        self.publish(params)

    def _share(self, group: dict[str, Any], param: torch.nn.Parameter, step: int, lr: float) -> float:
        """Return the weight of this step's z in x."""
        state = self.state[param]
        state["holds"] = "y"
        state["lr_max"] = max(lr, state.get("lr_max", 0.0))
        weight = step ** group["r"] * state["lr_max"] ** group["weight_lr_power"]
        state["weight_sum"] = state.get("weight_sum", 0.0) + weight
        return weight / state["weight_sum"] if state["weight_sum"] else 0.0

    @torch.no_grad()
    def eval(self) -> None:
        """Make parameters the average, with which a model is evaluated."""
        self._become("x")

    @torch.no_grad()
    def train(self) -> None:
        """Make parameters what is trained."""
        self._become("y")

    def _become(self, what: str) -> None:
        for group in self.param_groups:
            beta1 = group["betas"][0]
            for param in group["params"]:
                state = self.state.get(param, {})
                if state.get("holds", what) == what:  # before its first step the three are one
                    continue
                with widened(param) as (p,):
                    p.lerp_(real(state["z"]).to(p.dtype), 1 - 1 / beta1 if what == "x" else 1 - beta1)
                state["holds"] = what


@contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """Let an engine's model hold the average for a block: evaluate, save for export, generate.

    Every rank must enter and leave it, between two steps.

    Args:
        engine: a ``powertrain.Engine`` that trains with ``ScheduleFreeAdamW``.

    Raises:
        OptimizerError: it trains with another optimizer.
    """
    wrapper = engine.optimizer_wrapper
    optimizer = wrapper.optimizer
    if not isinstance(optimizer, ScheduleFreeAdamW):
        raise OptimizerError(
            "evaluating() is for schedule-free optimizers",
            where="evaluating",
            expected="ScheduleFreeAdamW",
            found=type(optimizer).__name__,
            remedy="evaluate without it",
        )
    wrapper.visit(ScheduleFreeAdamW.eval)
    wrapper.publish()
    try:
        yield
    finally:
        wrapper.visit(ScheduleFreeAdamW.train)
        wrapper.publish()
