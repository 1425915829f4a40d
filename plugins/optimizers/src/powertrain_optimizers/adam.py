"""Adam and AdamW, by the kernel ``adam``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from powertrain_optimizers.base import KernelOptimizer, decays, not_negative, refuse


class Adam(KernelOptimizer):
    """Adam ("Adam: A Method for Stochastic Optimization", Kingma and Ba, 2014), as ``torch.optim.Adam`` computes it.

    Args:
        params: tensors or groups.
        lr: learning rate, a number or a 0-d tensor.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: factor on the parameter, added to its gradient.
        maximize: climb.

    State: ``step`` (0-d fp32, on the host), ``exp_avg`` and ``exp_avg_sq`` (the parameter's shape).
    """

    kind = "adam"
    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        decays(betas)
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params``; those with equal numbers of steps in one call."""
        refuse(group, "amsgrad", type(self).__name__)
        if any("max_exp_avg_sq" in self.state[param] for param in params):
            refuse({"amsgrad": True}, "amsgrad", type(self).__name__)  # the checkpoint's optimizer had it
        beta1, beta2 = group["betas"]
        for step, alike in self.counted(params).items():
            self.update_by(
                "adam",
                alike,
                "exp_avg",
                "exp_avg_sq",
                step=step,
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=self.decoupled,
                scale=self.scale(group),
            )


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2017), as ``torch.optim.AdamW`` computes it.

    Args and state: those of ``Adam``; ``weight_decay`` times ``lr`` is the fraction of a parameter that a step takes.
    """

    kind = "adamw"
    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)
