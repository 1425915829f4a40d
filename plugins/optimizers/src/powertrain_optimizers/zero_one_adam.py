"""0/1 Adam: the second moment is renewed ever more rarely, and momentum is settled every few steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from powertrain_optimizers.base import KernelOptimizer, decays, not_negative, widened


class ZeroOneAdam(KernelOptimizer):
    """The optimizer's part of 0/1 Adam (Lu et al., "Maximizing Communication Efficiency … with 0/1 Adam", 2022).

    The second moment is renewed in steps whose distance doubles after each ``var_update_scaler`` of them, and stays
    after ``var_freeze_step``. From then on parameters take local steps, and a synchronization every few steps, whose
    distance doubles each ``local_step_scaler`` steps up to ``local_step_clipper``: there the momentum becomes the mean
    of the momenta since the last one, weighted by the learning rate.

    In the paper ranks do not talk in local steps. Here the wrapper averages gradients in each step, so that all ranks
    hold the same parameters, which may be sharded: the schedules are the paper's, the bytes that travel are not fewer
    by them. ``reducer`` lets gradients travel as one bit in every step but those that renew the
    second moment.

    Args:
        params: tensors or groups.
        lr: learning rate, a number or a 0-d tensor.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: fraction of the parameter, times ``lr``, that a step takes away.
        var_freeze_step: the last step that may change the second moment.
        var_update_scaler: changes of the second moment before their distance doubles.
        local_step_scaler: steps before the distance of synchronizations doubles.
        local_step_clipper: the largest distance of synchronizations, a power of 2.
        maximize: climb.

    State: ``step`` (0-d fp32, on the host); ``exp_avg``, ``exp_avg_sq`` and, after ``var_freeze_step``, ``travelled``
    (the parameter's shape); ``rates``, the sum of learning rates since the last synchronization (a number).
    """

    kind = "zero_one_adam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        var_freeze_step: int = 100_000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32_678,
        local_step_clipper: int = 16,
        *,
        maximize: bool = False,
    ) -> None:
        not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        decays(betas)
        counts = {
            "var_freeze_step": var_freeze_step,
            "var_update_scaler": var_update_scaler,
            "local_step_scaler": local_step_scaler,
            "local_step_clipper": local_step_clipper,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, but is {count}")
        if local_step_clipper & (local_step_clipper - 1):
            raise ValueError(f"local_step_clipper must be a power of 2, but is {local_step_clipper}")
        numbers = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, numbers | counts)

    @property
    def reducer(self) -> str | None:
        """Return "onebit" where the next step renews no parameter's second moment: only that takes exact gradients."""
        coming = [
            (int(self.state[param]["step"]) + 1, group)
            for group in self.param_groups
            for param in group["params"]
            if self.state.get(param)
        ]
        renewed = any(
            step <= group["var_freeze_step"] and renews_variance(step, group["var_update_scaler"])
            for step, group in coming
        )
        return "onebit" if coming and not renewed else None

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params`` one after the other."""
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        for step, alike in self.counted(params).items():
            renewed = variance_steps(min(step, group["var_freeze_step"]), group["var_update_scaler"])
            renews = step <= group["var_freeze_step"] and renews_variance(step, group["var_update_scaler"])
            local = step - group["var_freeze_step"]
            root_bias2 = math.sqrt(1 - beta2**renewed)
            for param in alike:
                grad = self.scaled(group, param)
                with widened(param, self.entry("exp_avg", param), self.entry("exp_avg_sq", param)) as (p, m, v):
                    if renews:
                        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                    m.lerp_(grad, 1 - beta1)
                    p.mul_(1 - lr * group["weight_decay"])
                    p.addcdiv_(m, (v.sqrt() / root_bias2).add_(group["eps"]), value=-lr / (1 - beta1**step))
                    if local > 0:
                        self._settle(param, m, lr, synchronizes=synchronizes(local, group))
        self.publish(params)

    def _settle(self, param: torch.nn.Parameter, momentum: torch.Tensor, lr: float, *, synchronizes: bool) -> None:
        """Count a step after the second moment is frozen; at a synchronization the momentum becomes the mean of all."""
        state = self.state[param]
        with widened(param, self.entry("travelled", param)) as (_, travelled):
            travelled.add_(momentum, alpha=lr)
            state["rates"] = state.get("rates", 0.0) + lr
            if synchronizes:
                if state["rates"] > 0:
                    momentum.copy_(travelled / state["rates"])
                travelled.zero_()
                state["rates"] = 0.0


def renews_variance(step: int, scaler: int) -> bool:
    """Return whether a step, counted from 1, renews the second moment.

    The first ``scaler`` steps do, then every second one until it were as many, then every fourth, and so on.
    """
    stage = ((step - 1) // scaler + 1).bit_length() - 1
    return (step - 1 - scaler * ((1 << stage) - 1)) % (1 << stage) == 0


def variance_steps(step: int, scaler: int) -> int:
    """Return how many of the steps 1 to ``step`` renew the second moment."""
    stage = ((step - 1) // scaler + 1).bit_length() - 1
    return stage * scaler + (step - 1 - scaler * ((1 << stage) - 1)) // (1 << stage) + 1


def synchronizes(step: int, group: dict[str, Any]) -> bool:
    """Return whether a step, counted from 1 after the second moment was frozen, settles the momentum."""
    stage, place = divmod(step - 1, int(group["local_step_scaler"]))
    distance = min(1 << min(stage, 62), int(group["local_step_clipper"]))
    return (place + 1) % distance == 0 or place + 1 == group["local_step_scaler"]
