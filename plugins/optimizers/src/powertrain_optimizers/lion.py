"""Lion, by the kernel ``lion``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from powertrain_optimizers.base import KernelOptimizer, decays, not_negative


class Lion(KernelOptimizer):
    """Lion ("Symbolic Discovery of Optimization Algorithms", Chen et al., 2023): steps of one size along a sign.

    Args:
        params: tensors or groups.
        lr: size of every step, a number or a 0-d tensor; about a tenth of what Adam takes.
        betas: weight of the momentum in the sign, and its decay.
        weight_decay: fraction of the parameter, times ``lr``, that a step takes away.
        maximize: climb.

    State: ``exp_avg`` (the parameter's shape).
    """

    kind = "lion"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        not_negative(lr=lr, weight_decay=weight_decay)
        decays(betas)
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params`` in one call."""
        beta1, beta2 = group["betas"]
        self.update_by(
            "lion",
            params,
            "exp_avg",
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=group["weight_decay"],
            scale=self.scale(group),
        )
