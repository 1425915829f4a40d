"""Blockwise quantization; see ``powertrain.kernels.blockwise``."""

from __future__ import annotations

import torch
import triton

from powertrain import kernels
from powertrain.kernels.blockwise import blocks_of
from powertrain_triton.device import blockwise
from powertrain_triton.table import FORMATS, UPDATED, ready

LONGEST = 4096
"""Elements of the longest block that a program holds."""

TILE = 2048
"""Elements of one program, if a block is not longer."""


def quantize(values: torch.Tensor, data: torch.Tensor, scales: torch.Tensor, *, bits: int, block: int) -> None:
    """Quantize a flat tensor; equal elements give the reference's bytes."""
    if values.dtype not in UPDATED or block > LONGEST:
        kernels.reference("quantize")(values, data, scales, bits=bits, block=block)
        return
    _together(values, data, scales)
    blocks = blocks_of(values, data, scales, bits=bits, block=block)
    half, rows = _tiles(block)
    top = 127.0 if bits == 8 else 7.0
    limit = torch.finfo(torch.float32).max / top * (1 - 2**-22)
    if blocks:
        with ready(values.device):
            blockwise.quantize[(-(-blocks // rows),)](
                values, data, scales, blocks, top, limit, BITS=bits, LENGTH=block, HALF=half, ROWS=rows,
                enable_fp_fusion=False,
            )  # fmt: skip


def dequantize(
    data: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, *, bits: int, block: int, add: bool = False
) -> None:
    """Fill a flat tensor with what ``quantize`` made bytes of, or add it."""
    if out.dtype not in UPDATED or block > LONGEST:
        kernels.reference("dequantize")(data, scales, out, bits=bits, block=block, add=add)
        return
    _together(out, data, scales)
    blocks = blocks_of(out, data, scales, bits=bits, block=block)
    half, rows = _tiles(block)
    if blocks:
        with ready(out.device):
            blockwise.dequantize[(-(-blocks // rows),)](
                data, scales, out, blocks, DTYPE=FORMATS[out.dtype], BITS=bits, ADD=add, LENGTH=block, HALF=half,
                ROWS=rows, enable_fp_fusion=False,
            )  # fmt: skip


def _tiles(block: int) -> tuple[int, int]:
    """Return half a block's length as a power of two, and the blocks of one program."""
    half = triton.next_power_of_2(block // 2)
    return half, max(1, TILE // (2 * half))


def _together(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.device != tensors[0].device or not tensor.is_contiguous():
            raise ValueError("a kernel takes contiguous tensors of one device")
