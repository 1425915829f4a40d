"""Adagrad, by the kernel ``adagrad``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from powertrain_optimizers.base import KernelOptimizer, not_negative


class Adagrad(KernelOptimizer):
    """Adagrad (Duchi, Hazan and Singer, 2011), as ``torch.optim.Adagrad`` computes it.

    Args:
        params: tensors or groups.
        lr: learning rate, a number or a 0-d tensor.
        lr_decay: the learning rate is divided by 1 + steps x lr_decay.
        weight_decay: factor on the parameter, added to its gradient.
        initial_accumulator_value: what the sum of squares starts from.
        eps: added to the denominator.
        maximize: climb.

    State: ``step`` (0-d fp32, on the host), ``sum`` (the parameter's shape). It is made in the first step.
    """

    kind = "adagrad"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        not_negative(lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps, initial=initial_accumulator_value)
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params``; those with equal numbers of steps in one call."""
        start = group["initial_accumulator_value"]
        for param in params if start else ():
            if "sum" not in self.state[param]:
                # The imaginary part of a complex parameter starts from it as well.
                self.state[param]["sum"] = self.zeros("sum", param).fill_(
                    complex(start, start) if param.is_complex() else start
                )
        for step, alike in self.counted(params).items():
            self.update_by(
                "adagrad",
                alike,
                "sum",
                step=step,
                lr=float(group["lr"]),
                lr_decay=group["lr_decay"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                scale=self.scale(group),
            )
