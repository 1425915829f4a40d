"""Blockwise symmetric quantization: numbers of 8 or 4 bits that share a scale by the block.

A row of elements becomes one row of bytes: the quantized elements, then one
fp32 scale for each block. The scale is the largest magnitude of the block over
the largest integer, so an element is off by half a step at most. It is fp32,
not fp16: gradients leave the range of fp16 at both ends, and in blocks of 256
it costs 1.6 % of the elements' bytes at 8 bits.
"""

from __future__ import annotations

from typing import Literal

import attrs
import torch

BLOCK = 256
"""Elements that share a scale."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What can be quantized; the scales are fp32, so larger numbers of fp64 count as infinite."""

_SCALE_BYTES = 4
_LARGEST_FLOAT = torch.finfo(torch.float32).max


@attrs.frozen
class Blockwise:
    """Turns rows of elements into rows of bytes and back; equal elements give equal bytes.

    Zeros stay zeros, and so do blocks whose largest magnitude is below about 1e-43.
    The largest finite number stays finite. A block with an element that is not
    finite comes back without any finite element: an overflow is seen after the
    trip, and cannot pass for a number.

    Args:
        bits: of an element: 8 (-127 to 127) or 4 (-7 to 7, two in a byte).
        block: elements that share a scale; a multiple of 8.
    """

    bits: Literal[8, 4]
    block: int = BLOCK

    def row_bytes(self, numel: int) -> int:
        """Return the length in bytes of a row of ``numel`` elements, a multiple of the block."""
        return numel * self.bits // 8 + numel // self.block * _SCALE_BYTES

    @torch.no_grad()
    def encode(self, elements: torch.Tensor) -> torch.Tensor:
        """Return ``elements`` (..., numel) as bytes (..., ``row_bytes``), contiguous.

        Rows may lie anywhere, but each must be contiguous; ``numel`` is a multiple of the block.
        """
        *rows, numel = elements.shape
        blocks = elements.unflatten(-1, (numel // self.block, self.block))
        if blocks.dtype == torch.float64:
            blocks = blocks.float()
        # The two reductions need no copy of the elements, and pass NaN on.
        largest = torch.maximum(blocks.amax(-1), -blocks.amin(-1)).float()
        top = 127 if self.bits == 8 else 7
        scales = largest / top
        # Rounded up, the scale of the largest floats would make them infinite.
        scales = torch.where(largest.isfinite(), scales.clamp(max=_LARGEST_FLOAT / top * (1 - 2**-22)), scales)
        steps = torch.where(scales == 0, 1.0, scales)
        # Where the scale is not finite, the bad elements count 1 and the others 0: times the scale, none is finite.
        integers = (blocks / steps.unsqueeze(-1)).round_().clamp_(-top, top).nan_to_num_(nan=1.0)
        result = torch.empty(*rows, self.row_bytes(numel), dtype=torch.uint8, device=elements.device)
        self._write(self._quantized(result, numel), integers)
        self._scales(result, numel).copy_(scales)
        return result

    def _write(self, target: torch.Tensor, integers: torch.Tensor) -> None:
        """Write integers (..., blocks, block), held in floats, as bytes (..., blocks, bytes of a block)."""
        if self.bits == 8:
            target.view(torch.int8).copy_(integers)
            return
        low, high = integers.add_(8).to(torch.uint8).chunk(2, -1)
        torch.bitwise_or(low, high << 4, out=target)

    @torch.no_grad()
    def decode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Fill ``out`` (..., numel), contiguous, with the elements of ``rows`` (..., ``row_bytes``)."""
        self._blend(rows, out, add=False)

    @torch.no_grad()
    def accumulate(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Add the elements of ``rows`` (..., ``row_bytes``) to ``out`` (..., numel), contiguous."""
        self._blend(rows, out, add=True)

    def _blend(self, rows: torch.Tensor, out: torch.Tensor, *, add: bool) -> None:
        numel = out.shape[-1]
        scales = self._scales(rows, numel).unsqueeze(-1)
        target = out.unflatten(-1, (numel // self.block, self.block))
        data = self._quantized(rows, numel)
        if self.bits == 8:
            parts = [(data.view(torch.int8), target)]
        else:
            low, high = target.chunk(2, -1)
            parts = [((data & 15).to(torch.int8) - 8, low), ((data >> 4).to(torch.int8) - 8, high)]
        for integers, place in parts:
            if add:
                place.add_(integers * scales)
            else:
                torch.mul(integers, scales, out=place)

    def _quantized(self, rows: torch.Tensor, numel: int) -> torch.Tensor:
        """Return the elements' part of rows of bytes, by the block."""
        data: torch.Tensor = rows[..., : numel * self.bits // 8]
        return data.view(*rows.shape[:-1], numel // self.block, self.block * self.bits // 8)

    def _scales(self, rows: torch.Tensor, numel: int) -> torch.Tensor:
        """Return the scales' part of rows of bytes, as numbers."""
        scales: torch.Tensor = rows[..., numel * self.bits // 8 :].view(torch.float32)
        return scales
