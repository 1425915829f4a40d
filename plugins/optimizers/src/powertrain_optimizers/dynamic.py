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


SHIFT = 12
"""Bits of an fp32 number that do not matter for its code: what is left of its fraction tells 1 part in 2048."""


class DynamicMap:
    """The values of the codes, and the code of each number.

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
        zero = torch.zeros(1, dtype=torch.float64)
        sizes = torch.cat([zero, *positive])
        values = torch.cat([-sizes[1:].flip(0), sizes]) if signed else sizes
        self.signed = signed
        self.values = values.to(device, torch.float32)
        # The bits of a number from 0 to 1, as an integer, grow with it: the upper ones are its place in a table.
        one = int(torch.ones(1).view(torch.int32)) >> SHIFT
        middles = (torch.arange(one + 1, dtype=torch.int32) * (1 << SHIFT) + (1 << (SHIFT - 1))).view(torch.float32)
        limits = (sizes[1:] + sizes[:-1]) / 2
        self._codes = torch.bucketize(middles.double(), limits).to(device, torch.uint8)

    def encode(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (numel,) and scales (blocks,) of flat fp32 numbers; the last block may be short.

        Without signs, what is above zero gets a code above zero: it divides.
        """
        blocks = _padded(numbers).view(-1, BLOCK)
        sizes = blocks.abs()
        scales = sizes.amax(-1)
        shares = sizes.div_(torch.where(scales == 0, 1.0, scales).unsqueeze(-1))
        # What is not finite leads beyond; its scale says so.
        places = (shares.view(torch.int32) >> SHIFT).clamp_(min=0, max=len(self._codes) - 1)
        codes = self._codes.index_select(0, places.view(-1)).view(places.shape)
        if self.signed:
            middle = len(self.values) // 2
            codes = torch.where(blocks < 0, middle - codes, middle + codes)
        else:
            codes = torch.maximum(codes, (shares > 0).to(torch.uint8))
        return codes.view(-1)[: numbers.numel()], scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return flat fp32 numbers."""
        blocks = self.values.index_select(0, _padded(codes).int()).view(-1, BLOCK)
        return blocks.mul_(scales.unsqueeze(-1)).view(-1)[: codes.numel()]


def count_blocks(numel: int) -> int:
    """Return how many blocks so many elements have."""
    return -(-numel // BLOCK)


def _padded(flat: torch.Tensor) -> torch.Tensor:
    rest = -flat.numel() % BLOCK
    return torch.nn.functional.pad(flat, (0, rest)) if rest else flat.contiguous()
