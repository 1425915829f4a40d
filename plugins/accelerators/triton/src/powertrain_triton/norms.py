"""RMSNorm and LayerNorm with their gradients; see ``powertrain.kernels.layers``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from powertrain import kernels
from powertrain_triton.device import norms
from powertrain_triton.table import FORMATS, UPDATED, ready

WIDEST = 1 << 15
"""Elements of the longest row that a program holds."""

TILE = 2048
"""Elements of one program, if a row is not longer."""

SHARE = 4
"""Programs of backward for each of the device's processors: each adds up what its rows give the weight."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide by the root mean square (Zhang and Sennrich, 2019)."""
    if not _fits(x, weight):
        return torch.as_tensor(kernels.reference("rms_norm")(x, weight, eps))
    return torch.as_tensor(_Norm.apply(x, weight, None, eps, False))


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Take off the mean and divide by the deviation (Ba, Kiros and Hinton, 2016)."""
    if not _fits(x, weight, bias):
        return torch.as_tensor(kernels.reference("layer_norm")(x, weight, bias, eps))
    return torch.as_tensor(_Norm.apply(x, weight, bias, eps, True))


def _fits(x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    for weight in weights:
        if weight is not None and weight.shape != x.shape[-1:]:
            raise ValueError(f"a weight of {tuple(weight.shape)} does not fit rows of {x.shape[-1]}")
    return x.dtype in UPDATED and 0 < x.shape[-1] <= WIDEST


def _shape(rows: int, dim: int) -> tuple[dict[str, int], int]:
    """Return the constants of a tile, and the number of tiles."""
    block = triton.next_power_of_2(dim)
    deep = max(1, TILE // block)
    warps = min(16, max(4, block * deep // 512))
    return {"DIM": dim, "BLOCK": block, "ROWS": deep, "num_warps": warps}, -(-rows // deep)


def _processors(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter; few, so that each has several tiles
        return 1
    return int(torch.get_device_module(device).get_device_properties(device).multi_processor_count)


class _Norm(torch.autograd.Function):
    """Both norms: RMSNorm is LayerNorm without the mean."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, eps: float, centred: bool) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        y, rows = torch.empty_like(x), x.numel() // x.shape[-1]
        factors = torch.empty(rows, dtype=torch.float32, device=x.device)
        means = torch.empty_like(factors) if centred else None
        constants, tiles = _shape(rows, x.shape[-1])
        if rows:
            with ready(x.device):
                norms.forward[(tiles,)](
                    x, weight, bias, y, means, factors, rows, eps,
                    DTYPE=FORMATS[x.dtype], CENTRED=centred, BIASED=bias is not None, **constants,
                )  # fmt: skip
        ctx.save_for_backward(x, weight, means, factors)
        ctx.bias = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, means, factors = ctx.saved_tensors
        slope, dim, rows = slope.contiguous(), x.shape[-1], len(factors)
        constants, tiles = _shape(rows, dim)
        programs = min(tiles, SHARE * _processors(x.device))
        out = torch.empty_like(x)
        weights = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
        biases = None if ctx.bias is None else torch.empty_like(weights)
        if rows:
            with ready(x.device):
                norms.backward[(programs,)](
                    slope, x, weight, means, factors, out, weights, biases, rows, tiles,
                    DTYPE=FORMATS[x.dtype], CENTRED=means is not None, BIASED=biases is not None, **constants,
                )  # fmt: skip
        to_bias = None if biases is None else biases.sum(0).to(ctx.bias)
        return out, weights.sum(0).to(weight.dtype), to_bias, None, None
