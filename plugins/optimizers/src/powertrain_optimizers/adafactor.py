"""Adafactor: Adam's second moment, as the product of a column and a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from powertrain_optimizers.base import KernelOptimizer, not_negative, only_real, widened


class Adafactor(KernelOptimizer):
    """Adafactor (Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018).

    The formula is that of ``torch.optim.Adafactor``: steps relative to the parameter's size, no momentum. The
    means over rows and columns need whole matrices.

    Args:
        params: tensors or groups.
        lr: the largest relative step, a number or a 0-d tensor.
        beta2_decay: the running averages forget by 1 - step^beta2_decay.
        eps: below whose square no second moment falls (None: the format's step at 1), and below which no parameter's
            size; None: (None, 1e-3).
        d: updates of a larger root mean square are scaled down to it.
        weight_decay: fraction of the parameter, times ``lr``, that a step takes away.
        maximize: climb.

    State: ``step`` (0-d fp32, on the host); ``row_var`` (…, rows, 1) and ``col_var`` (…, 1, columns) of parameters with
    two dimensions or more, ``variance`` (the parameter's shape) of others.
    """

    granularity = "matrix"
    kind = "adafactor"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] | None = None,
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        eps = (None, 1e-3) if eps is None else eps
        not_negative(lr=lr, weight_decay=weight_decay, eps1=eps[0] or 0.0, eps2=eps[1])
        if not beta2_decay <= 0:
            raise ValueError(f"beta2_decay must not be positive, but is {beta2_decay}")
        if not d >= 1:
            raise ValueError(f"d must be at least 1, but is {d}")
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": tuple(eps),
            "d": d,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params``, which are whole."""
        only_real(params, "Adafactor")
        for step, alike in self.counted(params).items():
            for param in alike:
                self._update_one(group, param, step)
        self.publish(params)

    def _update_one(self, group: dict[str, Any], param: torch.nn.Parameter, step: int) -> None:
        lr, (eps1, eps2) = float(group["lr"]), group["eps"]
        floor = torch.finfo(param.dtype).eps if eps1 is None else eps1
        weight = step ** group["beta2_decay"]
        grad = self.scaled(group, param)
        root = param.numel() ** 0.5
        with widened(param, *self._state(param)) as (p, *moments):
            size = (p.norm() / root).clamp(min=eps2) * min(lr, 1 / step**0.5)
            if group["weight_decay"]:
                p.mul_(1 - lr * group["weight_decay"])
            if len(moments) == 2:
                rows, columns = moments
                rows.lerp_(grad.norm(dim=-1, keepdim=True).square_().div_(grad.size(-1)), weight)
                columns.lerp_(grad.norm(dim=-2, keepdim=True).square_().div_(grad.size(-2)), weight)
                variance = (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=floor))
            else:
                variance = moments[0].lerp_(grad * grad, weight).clone()
            step_of = variance.clamp_(min=floor * floor).rsqrt_().mul_(grad)
            p.sub_(step_of.mul_(size / (step_of.norm() / (root * group["d"])).clamp(min=1.0)))

    def _state(self, param: torch.nn.Parameter) -> list[torch.Tensor]:
        """Return the row's and the column's means, or those of each element."""
        state = self.state[param]
        if param.ndim < 2:
            return [self.entry("variance", param)]
        if "row_var" not in state:
            state["row_var"] = param.new_zeros((*param.shape[:-1], 1))
            state["col_var"] = param.new_zeros((*param.shape[:-2], 1, param.shape[-1]))
        return [state["row_var"], state["col_var"]]
