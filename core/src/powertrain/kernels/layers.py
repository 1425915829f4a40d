"""Layers of transformers that a device may do in one kernel: norms, rotary embedding, SwiGLU, cross-entropy.

Each is differentiable, computes in fp32 whatever its arguments rest in, and
returns the type of its first argument; losses are fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""The target of a token that has no loss, as torch has it."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide by the root mean square ("Root Mean Square Layer Normalization", Zhang and Sennrich, 2019).

    Args:
        x: (..., dim) in fp32, bf16 or fp16.
        weight: (dim), multiplied afterwards.
        eps: added to the mean square.

    Returns:
        A tensor like ``x``.
    """
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * weight.float()).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Take off the mean and divide by the deviation ("Layer Normalization", Ba, Kiros and Hinton, 2016).

    Args:
        x: (..., dim) in fp32, bf16 or fp16.
        weight: (dim), multiplied afterwards.
        bias: (dim), added at last; None for none.
        eps: added to the variance.

    Returns:
        A tensor like ``x``.
    """
    wide = None if bias is None else bias.float()
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), wide, eps).to(x.dtype)


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys by their position ("RoFormer", Su et al., 2021), in halves as Llama does.

    Args:
        q: (batch, heads, seq, dim) in fp32, bf16 or fp16; ``dim`` is even.
        k: (batch, heads, seq, dim); its heads may be fewer.
        cos: (seq, dim) or (batch, seq, dim); gets no gradient.
        sin: likewise.

    Returns:
        ``q`` and ``k``, turned.
    """
    cos, sin = (_for_heads(table) for table in (cos, sin))
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _for_heads(table: torch.Tensor) -> torch.Tensor:
    """Return a table (seq, dim) or (batch, seq, dim) as (batch or 1, 1, seq, dim) in fp32."""
    return table.detach().float().view(-1, 1, *table.shape[-2:])


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` ("GLU Variants Improve Transformer", Shazeer, 2020), both of one shape and type."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@torch.no_grad()
def softmax_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, scale: float | torch.Tensor = 1.0, *, ignore_index: int = IGNORED
) -> torch.Tensor:
    """Return each row's loss, and leave the gradient of ``scale`` times their sum where the logits were.

    Args:
        logits: (rows, vocabulary) in fp32, bf16 or fp16, contiguous; overwritten by their gradient.
        targets: (rows) int64.
        scale: multiplies the gradient; one divided by the number of targets for the gradient of the mean.
        ignore_index: the target of rows whose loss and gradient are zero.

    Returns:
        The losses (rows) in fp32, without ``scale``.
    """
    wide = logits.float()
    losses = F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="none")
    kept = (targets != ignore_index).unsqueeze(1)
    hot = F.one_hot(targets.where(kept.squeeze(1), 0), logits.shape[1])
    logits.copy_(torch.where(kept, (wide.softmax(-1) - hot) * scale, 0.0))
    return losses


def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = IGNORED,
    chunk: int = 1024,
) -> torch.Tensor:
    """Return the mean loss of a linear layer's logits, of which no more than a chunk's are ever held.

    Args:
        hidden: (tokens, dim) in fp32, bf16 or fp16: what the last layer gets.
        weight: (vocabulary, dim): that layer's, of one type with ``hidden``.
        targets: (tokens) int64.
        ignore_index: the target of tokens that do not count.
        chunk: tokens whose logits are held at a time; they are computed anew in backward.

    Returns:
        The mean over the tokens that count: a number in fp32, NaN if none does.
    """
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    losses = [
        checkpoint(_summed_loss, piece, weight, wanted, ignore_index, use_reentrant=False) for piece, wanted in pieces
    ]
    return torch.stack(losses).sum() / (targets != ignore_index).sum()


def _summed_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=ignore_index, reduction="sum")
