"""Rotary embedding with its gradient; see ``powertrain.kernels.layers``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from powertrain import kernels
from powertrain_triton.device import rotary as device
from powertrain_triton.table import FORMATS, UPDATED, ready

MOST = 1 << 14
"""Elements of all heads of one token that a program holds."""


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys (batch, heads, seq, dim), in any order in memory, by position (Su et al., 2021)."""
    fits = q.dtype in UPDATED and k.dtype in UPDATED and max(q.shape[1], k.shape[1]) * q.shape[-1] <= MOST
    if not fits or not q.numel() or not k.numel():
        first, second = kernels.reference("rotary")(q, k, cos, sin)
        return first, second
    dim, length = q.shape[-1], q.shape[2]
    if k.shape[-1] != dim or k.shape[2] != length or dim % 2:
        raise ValueError(f"queries {tuple(q.shape)} and keys {tuple(k.shape)} differ in length or (even) dimension")
    for angles in (cos, sin):
        shapes = ((length, dim), (1, length, dim), (len(q), length, dim))
        if tuple(angles.shape) not in shapes:
            raise ValueError(f"angles {tuple(angles.shape)} are of one of the shapes {shapes}")
    turned_q, turned_k = _Rotary.apply(q, k, cos.detach(), sin.detach())
    return turned_q, turned_k


def _turn(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    # Like their arguments: heads beside one another stay so, and what follows needs no copy.
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    batch, heads, length, dim = q.shape
    strides = [stride for x in (q, k, q_out, k_out) for stride in x.stride()[:3]]
    tiles = [triton.next_power_of_2(x.shape[1]) for x in (q, k)]
    with ready(q.device):
        device.turn[(batch * length,)](
            q, k, q_out, k_out, cos, sin, length, *strides, cos.stride(0) if cos.ndim == 3 and len(cos) > 1 else 0,
            Q_HEADS=heads, K_HEADS=k.shape[1], DIM=dim, Q_DTYPE=FORMATS[q.dtype], K_DTYPE=FORMATS[k.dtype],
            Q_TILE=tiles[0], K_TILE=tiles[1], HALF=triton.next_power_of_2(dim // 2), BACK=back,
        )  # fmt: skip
    return q_out, k_out


class _Rotary(torch.autograd.Function):
    """The turn is linear, so that backward needs the angles alone."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_turn(q, k, cos, sin, True), None, None
