"""Sums: of squares, and of several arrays into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from powertrain.roles.communicator import Reduction

BLOCK = 1 << 16
"""Elements that are combined at a time: they stay in the processor's cache between two additions."""

COMBINE: Mapping[Reduction, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}

NARROW = (torch.bfloat16, torch.float16)
"""Types that are added in float32 and rounded once."""


@torch.no_grad()
def sums_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of each tensor's elements: (tensors,) in fp32, added up in fp64."""
    if not tensors:
        return torch.zeros(0)
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).float()


@torch.no_grad()
def combine(output: torch.Tensor, terms: Sequence[torch.Tensor], reduction: Reduction = "sum") -> None:
    """Combine ``terms`` in their order, from the first to the last, into ``output``.

    Args:
        output: the result; may be one of the terms.
        terms: two or more contiguous tensors of one length and type, which stay as they are.
        reduction: how; in types of 16 bits everything is added in float32 and rounded once.
    """
    how, mean = COMBINE[reduction], reduction == "mean"
    # One addition alone is rounded once by torch itself, and comparing rounds nothing.
    wide = output.dtype in NARROW and how is torch.add and (mean or len(terms) > 2)
    direct = len(terms) > 1 and not wide and not mean
    flat, rows = output.view(-1), [term.view(-1) for term in terms]
    for start in range(0, flat.numel(), BLOCK):
        result, *parts = (tensor[start : start + BLOCK] for tensor in (flat, *rows))
        total = parts[0].float() if wide else parts[0]
        for part in parts[1:-1] if direct else parts[1:]:
            total = how(total, part.float() if wide else part)
        if direct:  # without a copy at the end; every term of the block has been read by then, or is read now
            how(total, parts[-1], out=result)
        else:
            result.copy_(total / len(parts) if mean else total)
