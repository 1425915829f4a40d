"""Numbers of 8 bits whose steps grow with them, and a scale for each block.

The dynamic map of "8-bit Optimizers via Block-wise Quantization" (Dettmers et al.,
2021): seven decades, of which each has twice as many values as the one below, so
that large numbers are exact to a percent and small ones do not vanish. Here the
values are the upper ends of their intervals, so the largest number of a block,
whatever its sign, is exact.
"""

from __future__ import annotations

import torch

BLOCK = 256
"""Elements that share a scale: their largest magnitude."""

DECADES = 7
"""From the scale down to a millionth of it."""


class DynamicMap:
    """The values of the codes, and the limits between them.

    Args:
        signed: of both signs, or not negative.
        device: where.
    """

    def __init__(self, *, signed: bool, device: torch.device) -> None:
        positive = []
        for decade in range(DECADES):
            count = 2 ** (decade if signed else decade + 1)
            spread = torch.arange(1, count + 1, dtype=torch.float64) / count * 0.9 + 0.1
            positive.append(spread * 10.0 ** (decade + 1 - DECADES))
        above = torch.cat(positive)
        zero = torch.zeros(1, dtype=torch.float64)
        values = torch.cat([-above.flip(0), zero, above] if signed else [zero, above])
        self.signed = signed
        self.values = values.to(device, torch.float32)
        self.limits = ((values[1:] + values[:-1]) / 2).to(device, torch.float32)

    def encode(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (numel,) and scales (blocks,) of flat fp32 numbers; the last block may be short.

        Without signs, what is above zero gets a code above zero: it divides.
        """
        blocks = _padded(numbers).view(-1, BLOCK)
        scales = blocks.abs().amax(-1)
        shares = blocks / torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
        codes = torch.bucketize(shares, self.limits)
        if not self.signed:
            codes.clamp_(min=(shares > 0).to(codes.dtype))
        codes.clamp_(max=len(self.values) - 1)  # what is not finite leads beyond; its scale says so
        return codes.to(torch.uint8).view(-1)[: numbers.numel()], scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return flat fp32 numbers."""
        blocks = self.values[_padded(codes).int()].view(-1, BLOCK)
        return (blocks * scales.unsqueeze(-1)).view(-1)[: codes.numel()]


def count_blocks(numel: int) -> int:
    """Return how many blocks so many elements have."""
    return -(-numel // BLOCK)


def _padded(flat: torch.Tensor) -> torch.Tensor:
    rest = -flat.numel() % BLOCK
    return torch.nn.functional.pad(flat, (0, rest)) if rest else flat.contiguous()
