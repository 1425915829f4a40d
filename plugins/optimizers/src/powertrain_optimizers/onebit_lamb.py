"""1-bit LAMB: LAMB until its second moment has settled, then trust ratios that are carried on from there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from powertrain.kernels.updates import corrections
from powertrain_optimizers.base import KernelOptimizer, decays, not_negative, widened, width
from powertrain_optimizers.lamb import trust_ratios
from powertrain_optimizers.onebit_adam import all_past


class OneBitLamb(KernelOptimizer):
    """The optimizer's part of 1-bit LAMB (Li et al., "1-bit LAMB", 2021).

    Up to ``freeze_step`` it is LAMB, and keeps a running average of each tensor's trust ratio. Then the second moment
    stays as it is, and the ratio is that average times a factor: by how much the second moment, which goes on beside
    the frozen one, has fallen since, at the element where it fell most. The factor stays within ``factor_min`` and
    ``factor_max``, and changes by ``factor_threshold`` of itself a step.

    This class compresses nothing: ``reducer`` says when gradients may travel as one bit, as with ``OneBitAdam``. The
    paper rebuilds the gradient from the momentum that arrived; here the gradient is there.

    Args:
        params: tensors or groups.
        lr: learning rate, a number or a 0-d tensor.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: factor on the parameter, added to the direction.
        freeze_step: the last step that changes the second moment that divides.
        min_ratio: the smallest trust ratio of LAMB.
        max_ratio: the largest.
        coeff_beta: decay of the running average of the ratio.
        factor_min: the smallest factor on it.
        factor_max: the largest.
        factor_threshold: how much of itself the factor may change by in a step.
        maximize: climb.

    State: ``step`` (0-d fp32, on the host); ``exp_avg``, ``exp_avg_sq`` and, after ``freeze_step``,
    ``exp_avg_sq_fresh`` (the parameter's shape); ``ratio`` and ``factor`` (numbers).
    """

    granularity = "tensor"
    kind = "onebit_lamb"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        freeze_step: int = 100_000,
        min_ratio: float = 0.01,
        max_ratio: float = 10.0,
        coeff_beta: float = 0.9,
        factor_min: float = 0.5,
        factor_max: float = 4.0,
        factor_threshold: float = 0.1,
        *,
        maximize: bool = False,
    ) -> None:
        not_negative(lr=lr, eps=eps, weight_decay=weight_decay, min_ratio=min_ratio, factor_threshold=factor_threshold)
        decays((*betas, coeff_beta))
        if freeze_step < 1:
            raise ValueError(f"freeze_step must be at least 1, but is {freeze_step}")
        if not (max_ratio >= min_ratio and factor_max >= factor_min > 0):
            raise ValueError("max_ratio and factor_max must not be below min_ratio and factor_min, nor factor_min 0")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "freeze_step": freeze_step,
            "min_ratio": min_ratio,
            "max_ratio": max_ratio,
            "coeff_beta": coeff_beta,
            "factor_min": factor_min,
            "factor_max": factor_max,
            "factor_threshold": factor_threshold,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @property
    def reducer(self) -> str | None:
        """Return "onebit" once every parameter's second moment is frozen."""
        return "onebit" if all_past(self, "freeze_step") else None

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params``, pieces or whole; all ranks meet twice, for norms and for the largest quotients."""
        steps = {param: step for step, alike in self.counted(params).items() for param in alike}
        squares, quotients = [], []
        for param, step in steps.items():
            found = self._moments(group, param, step)
            squares.append(found[:3])
            quotients.append(found[3:])
        # Each rank takes part in both, whatever it holds, and in whichever part of the run its parameters are.
        sums = self.request.total(torch.stack(squares) if squares else torch.zeros(0, 3), list(steps))
        most = self.request.total(torch.stack(quotients) if quotients else torch.zeros(0, 1), list(steps), "max")
        lambs = trust_ratios(sums[:, :2], group["min_ratio"], group["max_ratio"]).tolist()
        shares = (sums[:, 2] / torch.where(sums[:, 1] > 0, sums[:, 1], 1.0)).sqrt().clamp(max=1.0).tolist()
        for (param, step), lamb, share, quotient in zip(
            steps.items(), lambs, shares, most.flatten().tolist(), strict=True
        ):
            ratio = self._ratio(group, param, step, lamb, share, quotient)
            with widened(param) as (p,):
                p.sub_(self._direction(group, param, step, p) * (float(group["lr"]) * ratio))
        self.publish(list(steps))

    def _moments(self, group: dict[str, Any], param: torch.nn.Parameter, step: int) -> torch.Tensor:
        """Renew the moments of a piece.

        Returns:
            (4,): the sums of squares of the piece, of its direction, and of that without the decay; then the largest
            quotient of the frozen denominator and the fresh one, 1 before there are two.
        """
        beta1, beta2 = group["betas"]
        grad = self.scaled(group, param)
        frozen = step > group["freeze_step"]
        state = self.state[param]
        if frozen and "exp_avg_sq_fresh" not in state:
            state["exp_avg_sq_fresh"] = self.entry("exp_avg_sq", param).clone()
        changing = self.entry("exp_avg_sq_fresh" if frozen else "exp_avg_sq", param)
        quotient = torch.ones(1, dtype=width(param), device=param.device)
        with widened(param, self.entry("exp_avg", param), changing) as (p, m, v):
            m.lerp_(grad, 1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if frozen and v.numel():
                fresh = (v.sqrt() / corrections(step, beta1, beta2)[1]).add_(group["eps"])
                quotient = (self._denominator(group, param, step) / fresh).max().view(1)
        with widened(param) as (p,):
            whole = self._direction(group, param, step, p)
            bare = whole - group["weight_decay"] * p
            sums = torch.stack([tensor.double().square().sum() for tensor in (p, whole, bare)])
        return torch.cat([sums.to(quotient.dtype), quotient])

    def _denominator(self, group: dict[str, Any], param: torch.nn.Parameter, step: int) -> torch.Tensor:
        _, root_bias2 = corrections(min(step, group["freeze_step"]), *group["betas"])
        with widened(param, self.entry("exp_avg_sq", param)) as (_, v):
            return (v.sqrt() / root_bias2).add_(group["eps"])

    def _direction(self, group: dict[str, Any], param: torch.nn.Parameter, step: int, p: torch.Tensor) -> torch.Tensor:
        """Return where a piece goes; ``p`` is its wide form."""
        bias1, _ = corrections(step, *group["betas"])
        with widened(param, self.entry("exp_avg", param)) as (_, m):
            direction = (m / bias1).div_(self._denominator(group, param, step))
        return direction.add_(p, alpha=group["weight_decay"])

    def _ratio(
        self, group: dict[str, Any], param: torch.nn.Parameter, step: int, lamb: float, share: float, quotient: float
    ) -> float:
        """Return a tensor's trust ratio, and remember what the next one needs.

        Args:
            group: its numbers.
            param: a piece of the tensor, or all of it.
            step: of this update.
            lamb: LAMB's ratio.
            share: of the direction's length, what is not decay.
            quotient: by how much the second moment's root has fallen since it was frozen, at most.
        """
        state = self.state[param]
        if step <= group["freeze_step"]:
            decay = group["coeff_beta"]
            state["ratio"] = decay * state.get("ratio", 0.0) + (1 - decay) * lamb
            return lamb
        factor = quotient * share + 1 - share if group["weight_decay"] else quotient
        last, change = state.get("factor", 1.0), group["factor_threshold"]
        factor = min(max(factor, group["factor_min"]), group["factor_max"])
        state["factor"] = min(max(factor, last * (1 - change)), last * (1 + change))
        # A running average that began at zero is too small by this.
        average: float = state["ratio"] / (1 - group["coeff_beta"] ** group["freeze_step"])
        return average * float(state["factor"])
