"""Blockwise symmetric quantization: numbers of 8 or 4 bits that share a scale by the block.

The scale is the largest magnitude of the block over the largest integer, so an
element is off by half a step at most. It is fp32, not fp16: gradients leave the
range of fp16 at both ends, and in blocks of 256 it costs 1.6 % of the elements'
bytes at 8 bits.

Zeros stay zeros, and so do blocks whose largest magnitude is below about 1e-43.
The largest finite number stays finite. A block with an element that is not
finite comes back without any finite element: an overflow is seen after the
trip, and cannot pass for a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import attrs
import torch

BLOCK = 256
"""Elements that share a scale."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What can be quantized; the scales are fp32, so larger numbers of fp64 count as infinite."""

_SCALE_BYTES = 4
_LARGEST_FLOAT = torch.finfo(torch.float32).max


@torch.no_grad()
def quantize(values: torch.Tensor, data: torch.Tensor, scales: torch.Tensor, *, bits: int, block: int) -> None:
    """Quantize a flat tensor; equal elements give equal bytes, on every device.

    Args:
        values: (numel) of a type in ``FLOATS``, contiguous; ``numel`` is a multiple of the block.
        data: (numel * bits / 8) uint8: the elements. Of 4 bits, a block's first half lies in the low halves of its
            bytes, and the second half in the high ones, each plus 8.
        scales: (numel / block) fp32.
        bits: of an element: 8 (-127 to 127) or 4 (-7 to 7).
        block: elements that share a scale; a multiple of 8.
    """
    blocks = values.view(-1, block)
    if blocks.dtype == torch.float64:
        blocks = blocks.float()
    # The two reductions need no copy of the elements, and pass NaN on.
    largest = torch.maximum(blocks.amax(-1), -blocks.amin(-1)).float()
    top = 127 if bits == 8 else 7
    found = largest / top
    # Rounded up, the scale of the largest floats would make them infinite.
    found = torch.where(largest.isfinite(), found.clamp(max=_LARGEST_FLOAT / top * (1 - 2**-22)), found)
    steps = torch.where(found == 0, 1.0, found)
    # Where the scale is not finite, the bad elements count 1 and the others 0: times the scale, none is finite.
    integers = (blocks / steps.unsqueeze(-1)).round_().clamp_(-top, top).nan_to_num_(nan=1.0)
    scales.copy_(found)
    target = data.view(len(blocks), -1)
    if bits == 8:
        target.view(torch.int8).copy_(integers)
        return
    low, high = integers.add_(8).to(torch.uint8).chunk(2, -1)
    torch.bitwise_or(low, high << 4, out=target)


@torch.no_grad()
def dequantize(
    data: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, *, bits: int, block: int, add: bool = False
) -> None:
    """Fill a flat tensor with what ``quantize`` made bytes of, or add it.

    Args:
        data: (numel * bits / 8) uint8.
        scales: (numel / block) fp32.
        out: (numel) of a type in ``FLOATS``, contiguous.
        bits: of an element.
        block: elements that share a scale.
        add: to what is in ``out``, in fp32.
    """
    target, factors = out.view(-1, block), scales.unsqueeze(-1)
    rows = data.view(len(target), -1)
    if bits == 8:
        parts = [(rows.view(torch.int8), target)]
    else:
        low, high = target.chunk(2, -1)
        parts = [((rows & 15).to(torch.int8) - 8, low), ((rows >> 4).to(torch.int8) - 8, high)]
    for integers, place in parts:
        if add:
            place.add_(integers * factors)
        else:
            torch.mul(integers, factors, out=place)


def blocks_of(elements: torch.Tensor, data: torch.Tensor, scales: torch.Tensor, *, bits: int, block: int) -> int:
    """Return the number of blocks, for kernels that would read and write beyond the ends of what does not fit.

    Raises:
        ValueError: there is no such format, or the bytes or scales are not as many as the elements need.
    """
    if bits not in (8, 4) or block < 8 or block % 8:
        raise ValueError(f"there is no quantization to {bits} bits in blocks of {block}")
    numel = elements.numel()
    fits = (numel % block, data.numel(), scales.numel()) == (0, numel * bits // 8, numel // block)
    if not fits or data.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise ValueError(
            f"{numel} elements in blocks of {block} do not fit {data.numel()} bytes of {data.dtype} "
            f"and {scales.numel()} scales of {scales.dtype}"
        )
    return numel // block


@attrs.frozen
class Blockwise:
    """Turns rows of elements into rows of bytes and back: the elements of a row, then its scales.

    Args:
        bits: of an element: 8 or 4.
        block: elements that share a scale; a multiple of 8.
        quantize: the device's kernel; by default the reference.
        dequantize: the device's kernel; by default the reference.
    """

    bits: Literal[8, 4]
    block: int = BLOCK
    quantize: Callable[..., Any] = attrs.field(default=quantize, eq=False, repr=False)
    dequantize: Callable[..., Any] = attrs.field(default=dequantize, eq=False, repr=False)

    def row_bytes(self, numel: int) -> int:
        """Return the length in bytes of a row of ``numel`` elements, a multiple of the block."""
        return numel * self.bits // 8 + numel // self.block * _SCALE_BYTES

    def encode(self, elements: torch.Tensor) -> torch.Tensor:
        """Return ``elements`` (..., numel) as bytes (..., ``row_bytes``), contiguous.

        Rows may lie anywhere, but each must be contiguous; ``numel`` is a multiple of the block.
        """
        *rows, numel = elements.shape
        result = torch.empty(*rows, self.row_bytes(numel), dtype=torch.uint8, device=elements.device)
        for values, row in zip(_each_row(elements), _each_row(result), strict=True):
            self.quantize(values, *self._parts(row, numel), bits=self.bits, block=self.block)
        return result

    def decode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Fill ``out`` (..., numel), contiguous, with the elements of ``rows`` (..., ``row_bytes``)."""
        self._blend(rows, out, add=False)

    def accumulate(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Add the elements of ``rows`` (..., ``row_bytes``) to ``out`` (..., numel), contiguous."""
        self._blend(rows, out, add=True)

    def _blend(self, rows: torch.Tensor, out: torch.Tensor, *, add: bool) -> None:
        numel = out.shape[-1]
        for row, target in zip(_each_row(rows), _each_row(out), strict=True):
            self.dequantize(*self._parts(row, numel), target, bits=self.bits, block=self.block, add=add)

    def _parts(self, row: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the elements' and the scales' part of one row of bytes."""
        cut = numel * self.bits // 8
        return row[:cut], row[cut:].view(torch.float32)


def _each_row(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the rows of a tensor, whose last dimension is contiguous."""
    if tensor.ndim == 1:
        return [tensor]
    return [row for part in tensor.unbind(0) for row in _each_row(part)]
