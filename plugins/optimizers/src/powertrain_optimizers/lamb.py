"""LAMB, by the kernels ``lamb_moments`` and ``lamb_apply``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from powertrain_optimizers.base import KernelOptimizer, decays, not_negative
from powertrain_optimizers.operands import batches


class Lamb(KernelOptimizer):
    """LAMB ("Large Batch Optimization for Deep Learning", You et al., 2019): Adam with a trust ratio for each tensor.

    A step is as long as ``lr`` times the parameter's norm, clamped by ``min_ratio`` and ``max_ratio`` times the
    length that Adam would give it; a tensor of zeros, or without a direction, takes Adam's own.

    Args:
        params: tensors or groups.
        lr: learning rate, a number or a 0-d tensor.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: factor on the parameter, added to the direction.
        min_ratio: the smallest trust ratio.
        max_ratio: the largest trust ratio.
        maximize: climb.

    State: ``step`` (0-d fp32, on the host), ``exp_avg`` and ``exp_avg_sq`` (the parameter's shape).
    """

    granularity = "tensor"
    kind = "lamb"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        min_ratio: float = 0.0,
        max_ratio: float = 10.0,
        *,
        maximize: bool = False,
    ) -> None:
        not_negative(lr=lr, eps=eps, weight_decay=weight_decay, min_ratio=min_ratio)
        decays(betas)
        if not max_ratio >= min_ratio:
            raise ValueError(f"max_ratio must be at least min_ratio, but they are {max_ratio} and {min_ratio}")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "min_ratio": min_ratio,
            "max_ratio": max_ratio,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params``, pieces or whole; all ranks meet once, for the norms of whole tensors."""
        beta1, beta2 = group["betas"]
        numbers = {
            "beta1": float(beta1),
            "beta2": float(beta2),
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
        }
        calls = [
            (step, alike, self.rows(alike, "exp_avg", "exp_avg_sq")) for step, alike in self.counted(params).items()
        ]
        order = [param for _, alike, _ in calls for param in alike]
        squares = []
        for step, alike, rows in calls:
            found: list[torch.Tensor] = [torch.empty(0)] * len(alike)
            for places, operands in batches(rows):
                sums = self.kernel_for("lamb_moments", operands)(
                    operands, step=step, scale=self.scale(group), **numbers
                )
                for place, row in zip(places, sums, strict=True):
                    found[place] = row
            squares += found
        ratios = trust_ratios(self.total_squares(squares, order), group["min_ratio"], group["max_ratio"])
        rates = ratios * float(group["lr"])
        done = 0
        for step, alike, rows in calls:
            mine = rates[done : done + len(alike)]
            done += len(alike)
            for places, operands in batches(rows):
                self.kernel_for("lamb_apply", operands)(operands, rates=mine[places], step=step, **numbers)

    def total_squares(self, squares: Sequence[torch.Tensor], params: Sequence[torch.nn.Parameter]) -> torch.Tensor:
        """Return the parameters' sums (parameters, 2) over all ranks; every rank calls it, with none of its own too."""
        return self.request.total(torch.stack(list(squares)) if squares else torch.zeros(0, 2), params)


def trust_ratios(squares: torch.Tensor, smallest: float, largest: float) -> torch.Tensor:
    """Return by what each parameter's step is longer than Adam's.

    Args:
        squares: (parameters, 2): of each, the sum of squares of its elements and of its direction's.
        smallest: ratio.
        largest: ratio.
    """
    norms = squares.sqrt()
    lengths, directions = norms.unbind(1)
    known = (lengths > 0) & (directions > 0)
    ratios = (lengths / torch.where(known, directions, 1.0)).clamp(smallest, largest)
    return torch.where(known, ratios, 1.0)
