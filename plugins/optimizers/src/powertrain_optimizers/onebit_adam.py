"""1-bit Adam: Adam until its second moment has settled, then momentum over a frozen one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from powertrain.kernels.updates import corrections
from powertrain_optimizers.base import KernelOptimizer, decays, not_negative, widened


class OneBitAdam(KernelOptimizer):
    """The optimizer's part of 1-bit Adam (Tang et al., "1-bit Adam", 2021).

    Up to ``freeze_step`` it is AdamW. Then the second moment stays as it is, and so does its bias correction: an
    update is a linear function of the gradients, which is what makes it safe to compress them with error feedback.
    This class compresses nothing. It says by ``reducer`` when gradients may travel as one bit; whether they do is
    the matter of the communicator. The paper compresses each rank's momentum; here it is the gradient of which the
    momentum is made. Without compression the two are the same.

    Args:
        params: tensors or groups.
        lr: learning rate, a number or a 0-d tensor.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: fraction of the parameter, times ``lr``, that a step takes away.
        freeze_step: the last step that changes the second moment; 15 to 20 % of all steps.
        maximize: climb.

    State: ``step`` (0-d fp32, on the host), ``exp_avg`` and ``exp_avg_sq`` (the parameter's shape).
    """

    kind = "onebit_adam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        freeze_step: int = 100_000,
        *,
        maximize: bool = False,
    ) -> None:
        not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        decays(betas)
        if freeze_step < 1:
            raise ValueError(f"freeze_step must be at least 1, but is {freeze_step}")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "freeze_step": freeze_step,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @property
    def reducer(self) -> str | None:
        """Return "onebit" once every parameter's second moment is frozen."""
        return "onebit" if all_past(self, "freeze_step") else None

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params``; before the second moment is frozen, those with equal numbers of steps in one call."""
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        for step, alike in self.counted(params).items():
            if step <= group["freeze_step"]:
                self.update_by(
                    "adam",
                    alike,
                    "exp_avg",
                    "exp_avg_sq",
                    step=step,
                    lr=lr,
                    beta1=float(beta1),
                    beta2=float(beta2),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    decoupled=True,
                    scale=self.scale(group),
                )
                continue
            bias1, _ = corrections(step, beta1, beta2)
            _, root_bias2 = corrections(group["freeze_step"], beta1, beta2)
            for param in alike:
                with widened(param, self.entry("exp_avg", param)) as (p, m):
                    m.lerp_(self.scaled(group, param), 1 - beta1)
                    denominator = self.denominator(param, root_bias2, group["eps"])
                    p.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, denominator, value=-lr / bias1)
            self.publish(alike)

    def denominator(self, param: torch.nn.Parameter, root_bias2: float, eps: float) -> torch.Tensor:
        """Return what an update is divided by: the root of the second moment, corrected, and ``eps``."""
        with widened(param, self.entry("exp_avg_sq", param)) as (_, v):
            return (v.sqrt() / root_bias2).add_(eps)


def all_past(optimizer: torch.optim.Optimizer, key: str) -> bool:
    """Return whether each parameter that was ever updated has taken as many steps as its group's ``key`` says."""
    steps = [
        int(optimizer.state[param]["step"]) >= group[key]
        for group in optimizer.param_groups
        for param in group["params"]
        if optimizer.state.get(param)
    ]
    return bool(steps) and all(steps)
