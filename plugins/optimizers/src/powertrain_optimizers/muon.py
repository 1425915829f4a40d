"""Muon: momentum that is made orthogonal before it moves a matrix; AdamW for what is no matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, Literal

import torch

from powertrain.errors import OptimizerError
from powertrain_optimizers.base import KernelOptimizer, decays, not_negative, only_real, widened

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that an iteration applies to the singular values (Jordan, 2024)."""

FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Formats of the iteration."""


class Muon(KernelOptimizer):
    """Muon ("Muon: An optimizer for hidden layers in neural networks", Jordan et al., 2024), with AdamW beside it.

    A matrix moves by its momentum with all singular values brought near 1, by Newton-Schulz iterations. A group
    with ``use_muon`` true is updated so (what has more than two dimensions as a matrix of its first by the others),
    one with false by AdamW; where it says nothing, parameters of two dimensions are, and others not. Embeddings and
    heads, which are matrices as well, should be in a group with false: ``groups_of`` goes by names.

    Args:
        params: tensors or groups.
        lr: learning rate, a number or a 0-d tensor.
        weight_decay: fraction of the parameter, times ``lr``, that a step takes away.
        momentum: decay of the momentum.
        nesterov: look ahead along the momentum.
        ns_coefficients: of the iteration.
        eps: the norm by which a matrix is divided is at least this.
        ns_steps: iterations.
        adjust_lr_fn: "original" scales ``lr`` by max(1, rows/columns)^0.5, "match_rms_adamw" by
            0.2 max(rows, columns)^0.5, so that an update is as large as AdamW's (Liu et al., 2025).
        ns_dtype: the format of the iterations: "bf16" or "fp32".
        betas: AdamW's.
        adamw_eps: AdamW's.
        maximize: climb.

    State: ``momentum_buffer`` of matrices; ``step``, ``exp_avg``, ``exp_avg_sq`` of others.
    """

    granularity = "matrix"
    kind = "muon"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = "original",
        ns_dtype: Literal["bf16", "fp32"] = "bf16",
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        *,
        maximize: bool = False,
    ) -> None:
        not_negative(lr=lr, weight_decay=weight_decay, momentum=momentum, eps=eps, adamw_eps=adamw_eps)
        decays(betas)
        if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"adjust_lr_fn must be original or match_rms_adamw, but is {adjust_lr_fn}")
        if ns_dtype not in FORMATS:
            raise ValueError(f"ns_dtype must be bf16 or fp32, but is {ns_dtype}")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "betas": tuple(betas),
            "adamw_eps": adamw_eps,
            "maximize": maximize,
            "use_muon": None,
        }
        super().__init__(params, defaults)

    def needs_whole(self, group: Mapping[str, Any], param: torch.Tensor) -> bool:
        """Return whether a parameter is a matrix that Muon moves; AdamW's may be cut."""
        return is_matrix(group, param)

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params``, which are whole."""
        only_real(params, "Muon")
        matrices = [param for param in params if is_matrix(group, param)]
        for param in matrices:
            self._move(group, param)
        self.publish(matrices)
        beta1, beta2 = group.get("betas", (0.9, 0.95))  # groups of torch's Muon have none, and no such parameters
        others = [param for param in params if not is_matrix(group, param)]
        for step, alike in self.counted(others).items():
            self.update_by(
                "adam",
                alike,
                "exp_avg",
                "exp_avg_sq",
                step=step,
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=group.get("adamw_eps", 1e-8),
                weight_decay=group["weight_decay"],
                decoupled=True,
                scale=self.scale(group),
            )

    def _move(self, group: dict[str, Any], param: torch.nn.Parameter) -> None:
        """Update one matrix."""
        grad, lr = self.scaled(group, param), float(group["lr"])
        with widened(param, self.entry("momentum_buffer", param)) as (p, momentum):
            momentum.lerp_(grad, 1 - group["momentum"])
            direction = grad.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
            matrix = direction.reshape(len(direction), -1)
            found = orthogonal(
                matrix,
                group["ns_coefficients"],
                group["ns_steps"],
                group["eps"],
                FORMATS[group.get("ns_dtype", "bf16")],
            )
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(found.view(p.shape), alpha=-lr * size_factor(group["adjust_lr_fn"], matrix.shape))


def is_matrix(group: Mapping[str, Any], param: torch.Tensor) -> bool:
    """Return whether Muon moves a parameter of a group, and not AdamW.

    Raises:
        OptimizerError: the group wants it, and it has fewer than two dimensions.
    """
    wanted: bool | None = group.get("use_muon")
    if wanted and param.ndim < 2:
        raise OptimizerError(
            "a group with use_muon = true holds a parameter that is no matrix",
            where="optimizer.param_groups",
            expected="two dimensions or more",
            found=f"a parameter of shape {tuple(param.shape)}",
            remedy="put it into a group with use_muon = false",
        )
    return param.ndim == 2 if wanted is None else wanted


def orthogonal(
    matrix: torch.Tensor, coefficients: Sequence[float], steps: int, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Bring the singular values of a matrix near 1 (about 0.7 to 1.2) by Newton-Schulz iterations.

    Args:
        matrix: (rows, columns); it is left as it is.
        coefficients: a, b, c of a x + b x^3 + c x^5.
        steps: iterations.
        eps: the norm by which it is divided first is at least this.
        dtype: the format in which it is computed, and of the result.
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(dtype, copy=True)
    x = x.T if tall else x
    x = x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def size_factor(rule: str | None, shape: Sequence[int]) -> float:
    """Return what the learning rate of a matrix of some shape is multiplied by."""
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if rule == "match_rms_adamw" else math.sqrt(max(1, rows / columns))


def groups_of(
    named: Iterable[tuple[str, torch.nn.Parameter]], adamw_names: Sequence[str], **adamw: Any
) -> list[dict[str, Any]]:
    """Return two groups: matrices, which Muon updates, and all that AdamW does.

    Args:
        named: the model's parameters by name.
        adamw_names: patterns of the names of matrices that are AdamW's ("*embed*").
        adamw: numbers of AdamW's group (lr, weight_decay).
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, param in named:
        hidden = param.ndim == 2 and not any(fnmatch(name, pattern) for pattern in adamw_names)
        (matrices if hidden else others).append(param)
    return [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False, **adamw}]
