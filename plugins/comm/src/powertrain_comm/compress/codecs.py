"""How rows of gradients become rows of bytes and back.

Each codec gives equal bytes for equal elements, and lets no number pass for
what was none: a row (or block) with inf or NaN comes back with inf or NaN.
int8 and int4 are the core's ``Blockwise``.
"""

from __future__ import annotations

from typing import Protocol

import attrs
import torch

from powertrain.kernels import kernel
from powertrain.kernels.blockwise import Blockwise
from powertrain.roles.accelerator import Accelerator
from powertrain_comm.config import Compress

INDEX_BYTES = 4
VALUE_BYTES = 4


class Codec(Protocol):
    """Turns rows of fp32 elements into rows of bytes and back.

    Attributes:
        block: rows are a multiple of so many elements.
    """

    @property
    def block(self) -> int:
        """Return what a row's number of elements must be a multiple of."""

    def row_bytes(self, numel: int) -> int:
        """Return the bytes that a row of ``numel`` elements becomes."""

    def encode(self, elements: torch.Tensor) -> torch.Tensor:
        """Return ``elements`` (rows, numel) in fp32 as bytes (rows, ``row_bytes``)."""

    def decode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Fill ``out`` (rows, numel) in fp32."""


@attrs.frozen
class OneBit:
    """An element is its sign; a block's elements share their mean magnitude.

    "1-bit Adam" (Tang et al., arXiv 2102.02888), section 4, with a scale by the block instead of by the tensor.
    Without error feedback it does not converge.
    """

    block: int = 256

    def row_bytes(self, numel: int) -> int:
        """Return an eighth of the elements, and a scale for each block."""
        return numel // 8 + numel // self.block * VALUE_BYTES

    @torch.no_grad()
    def encode(self, elements: torch.Tensor) -> torch.Tensor:
        """Pack signs, bit i of a byte for its element i; zero counts as positive."""
        rows, numel = elements.shape
        result = torch.empty(rows, self.row_bytes(numel), dtype=torch.uint8, device=elements.device)
        positive = (elements >= 0).to(torch.uint8).view(rows, numel // 8, 8)
        packed = result[:, : numel // 8]
        packed.copy_(positive[..., 0])
        for bit in range(1, 8):
            packed.bitwise_or_(positive[..., bit] << bit)
        means = elements.abs().view(rows, -1, self.block).mean(-1)
        result[:, numel // 8 :] = means.contiguous().view(torch.uint8)
        return result

    @torch.no_grad()
    def decode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Give each element its block's magnitude with its own sign."""
        numel = out.shape[-1]
        # A copy: where the signs end, no number of 4 bytes need be able to begin.
        scales = rows[:, numel // 8 :].clone(memory_format=torch.contiguous_format).view(torch.float32)
        bits = torch.arange(8, dtype=torch.uint8, device=rows.device)
        signs = (rows[:, : numel // 8].unsqueeze(-1) >> bits) & 1
        blocks = out.view(len(rows), -1, self.block)
        blocks.copy_(signs.view_as(blocks)).mul_(2).sub_(1).mul_(scales.unsqueeze(-1))


@attrs.frozen
class TopK:
    """The largest elements of a row by magnitude, exactly; the others are zero.

    "Deep Gradient Compression" (Lin et al., arXiv 1712.01887) without its tricks for momentum. NaN counts as the
    largest.

    Attributes:
        ratio: the part of a row's elements that is sent, at 8 bytes each; at least one is.
    """

    ratio: float
    block: int = 1

    def kept(self, numel: int) -> int:
        """Return how many elements of a row travel."""
        return min(numel, max(1, round(numel * self.ratio)))

    def row_bytes(self, numel: int) -> int:
        """Return a value and an index for each of them."""
        return self.kept(numel) * (VALUE_BYTES + INDEX_BYTES)

    @torch.no_grad()
    def encode(self, elements: torch.Tensor) -> torch.Tensor:
        """Return values, then their indices."""
        numel = elements.shape[-1]
        places = elements.abs().topk(self.kept(numel), dim=-1, sorted=False).indices
        values = elements.gather(-1, places)
        return torch.cat([values.view(torch.uint8), places.to(torch.int32).view(torch.uint8)], -1)

    @torch.no_grad()
    def decode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Put values where they belong, among zeros."""
        cut = self.kept(out.shape[-1]) * VALUE_BYTES
        values = rows[:, :cut].contiguous().view(torch.float32)
        places = rows[:, cut:].contiguous().view(torch.int32).long()
        out.zero_().scatter_(-1, places, values)


def codec_of(method: str, table: Compress, accelerator: Accelerator) -> Codec:
    """Return the codec that ``method`` names, with the accelerator's kernels where it has them."""
    if method == "onebit":
        return OneBit(table.block)
    if method == "topk":
        return TopK(table.ratio)
    quantize, dequantize = kernel(accelerator, "quantize"), kernel(accelerator, "dequantize")
    return Blockwise(8 if method == "int8" else 4, table.block, quantize, dequantize)
