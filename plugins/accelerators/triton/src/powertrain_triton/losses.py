"""Cross-entropy of given logits, and of a linear layer whose logits are never all there.

See ``powertrain.kernels.layers``. For each chunk of tokens there are: its logits
(one matrix product), the kernel that turns them into their gradient, and two more
products. The gradients are ready when forward ends, and backward scales them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from powertrain import kernels
from powertrain.kernels.layers import IGNORED
from powertrain_triton.device import losses as device
from powertrain_triton.table import FORMATS, UPDATED, number, ready

WIDEST = 4096
"""Logits of a row that a program holds at a time."""


@torch.no_grad()
def softmax_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, scale: float | torch.Tensor = 1.0, *, ignore_index: int = IGNORED
) -> torch.Tensor:
    """Return each row's loss, and leave the gradient of ``scale`` times their sum where the logits were."""
    if logits.dtype not in UPDATED:
        return torch.as_tensor(
            kernels.reference("softmax_cross_entropy")(logits, targets, scale, ignore_index=ignore_index)
        )
    return _over_rows(logits, targets, number(scale, logits.device), ignore_index, True)


def _over_rows(
    logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor, ignored: int, gradient: bool
) -> torch.Tensor:
    if not logits.is_contiguous():
        raise ValueError("logits whose gradient is written in their place are contiguous")
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(triton.next_power_of_2(width), WIDEST)
    if rows:
        with ready(logits.device):
            device.softmax_cross_entropy[(rows,)](
                logits, targets.contiguous(), losses, scale, ignored, DTYPE=FORMATS[logits.dtype], WIDTH=width,
                GRADIENT=gradient, BLOCK=block, num_warps=min(16, max(4, block // 256)),
            )  # fmt: skip
    return losses


def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = IGNORED,
    chunk: int = 1024,
) -> torch.Tensor:
    """Return the mean loss of a linear layer's logits, of which no more than a chunk's are ever held."""
    if hidden.dtype not in UPDATED or hidden.dtype != weight.dtype:
        return torch.as_tensor(
            kernels.reference("cross_entropy")(hidden, weight, targets, ignore_index=ignore_index, chunk=chunk)
        )
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden, weight = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (hidden, weight))
    with torch.autocast(kind, enabled=False):  # products and sums below are of the types that they are given
        return torch.as_tensor(_LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, chunk))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients while a chunk's logits are there.

    They are those of the sum of the losses: one over the number of tokens, which backward multiplies by together
    with the loss scale, would leave the range of fp16.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, ignored: int, chunk: int) -> torch.Tensor:
        wanted = ctx.needs_input_grad[:2]
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        # Gradients of 16 bits would lose small chunks beside the sum of many.
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        one = number(1.0, hidden.device)
        for start in range(0, len(hidden), chunk):
            piece = slice(start, start + chunk)
            rows = hidden[piece]
            logits = rows @ weight.T
            losses[piece] = _over_rows(logits, targets[piece], one, ignored, any(wanted))
            if to_hidden is not None:
                to_hidden[piece] = logits @ weight
            if to_weight is not None:
                if weight.dtype == torch.float32:
                    to_weight.addmm_(logits.T, rows)
                else:
                    to_weight.add_(logits.T @ rows)
        if to_weight is not None and weight.dtype == torch.bfloat16:  # fp16 has no room for a sum over all tokens
            to_weight = to_weight.to(weight.dtype)
        count = (targets != ignored).sum()
        ctx.save_for_backward(to_hidden, to_weight, count)
        ctx.formats = hidden.dtype, weight.dtype
        return torch.div(losses.sum(), count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *gradients, count = ctx.saved_tensors
        factor = torch.where(count > 0, slope.float() / count, 0.0)
        scaled = [
            None if gradient is None else (gradient * factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.formats, strict=True)
        ]
        return *scaled, None, None, None
