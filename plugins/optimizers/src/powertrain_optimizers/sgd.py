"""Stochastic gradient descent with momentum, by the kernel ``momentum``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from powertrain_optimizers.base import KernelOptimizer, not_negative


class SGD(KernelOptimizer):
    """Stochastic gradient descent (Robbins and Monro, 1951; Sutskever et al., 2013), as ``torch.optim.SGD`` has it.

    Args:
        params: tensors or groups.
        lr: learning rate, a number or a 0-d tensor.
        momentum: decay of the running sum of gradients; 0 keeps none.
        dampening: one minus the weight of a new gradient in the sum.
        weight_decay: factor on the parameter, added to its gradient.
        nesterov: look ahead along the momentum.
        maximize: climb.

    State: ``momentum_buffer`` (the parameter's shape), with momentum only.
    """

    kind = "sgd"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError("nesterov needs momentum above 0 and no dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params``; those without a momentum yet take their gradient for it."""
        has_momentum = group["momentum"] != 0
        for first_time in (False, True):
            chosen = [param for param in params if (self.state[param].get("momentum_buffer") is None) == first_time]
            if not chosen:
                continue
            if first_time:  # torch leaves None here, which is no tensor to go on from
                for param in chosen:
                    self.state[param].pop("momentum_buffer", None)
            self.update_by(
                "momentum",
                chosen,
                "momentum_buffer" if has_momentum else None,
                lr=float(group["lr"]),
                momentum=group["momentum"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                weight_decay=group["weight_decay"],
                first_time=first_time,
                scale=self.scale(group),
            )
