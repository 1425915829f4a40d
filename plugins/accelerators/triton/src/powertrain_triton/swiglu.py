"""SwiGLU with its gradient; see ``powertrain.kernels.layers``."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from powertrain import kernels
from powertrain_triton.device import swiglu as device
from powertrain_triton.table import BLOCK, FORMATS, UPDATED, ready


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` (Shazeer, 2020)."""
    if gate.dtype not in UPDATED or gate.dtype != up.dtype or gate.shape != up.shape or not gate.numel():
        return torch.as_tensor(kernels.reference("swiglu")(gate, up))
    return torch.as_tensor(_SwiGlu.apply(gate, up))


class _SwiGlu(torch.autograd.Function):
    """Keeps its two arguments and no intermediate: backward computes the sigmoid anew."""

    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        with ready(gate.device):
            device.forward[(-(-out.numel() // BLOCK),)](
                gate, up, out, out.numel(), DTYPE=FORMATS[out.dtype], BLOCK=BLOCK
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        with ready(gate.device):
            device.backward[(-(-gate.numel() // BLOCK),)](
                slope.contiguous(), gate, up, to_gate, to_up, gate.numel(), DTYPE=FORMATS[gate.dtype], BLOCK=BLOCK
            )
        return to_gate, to_up
