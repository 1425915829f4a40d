"""Blockwise quantization; see ``powertrain.kernels.blockwise``."""

from __future__ import annotations

import torch
import triton

from powertrain import kernels
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
    _check(values, data, scales, bits, block)
    blocks, half, rows = _tiles(values.numel(), block)
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
    _check(out, data, scales, bits, block)
    blocks, half, rows = _tiles(out.numel(), block)
    if blocks:
        with ready(out.device):
            blockwise.dequantize[(-(-blocks // rows),)](
                data, scales, out, blocks, DTYPE=FORMATS[out.dtype], BITS=bits, ADD=add, LENGTH=block, HALF=half,
                ROWS=rows, enable_fp_fusion=False,
            )  # fmt: skip


def _tiles(numel: int, block: int) -> tuple[int, int, int]:
    """Return the number of blocks, half a block's length as a power of two, and the blocks of one program."""
    half = triton.next_power_of_2(block // 2)
    return numel // block, half, max(1, TILE // (2 * half))


def _check(elements: torch.Tensor, data: torch.Tensor, scales: torch.Tensor, bits: int, block: int) -> None:
    """Refuse what would be read or written beyond the tensors' ends."""
    for tensor in (data, scales):
        if tensor.device != elements.device or not tensor.is_contiguous() or not elements.is_contiguous():
            raise ValueError("a kernel takes contiguous tensors of one device")
    if bits not in (8, 4) or block < 8 or block % 8:
        raise ValueError(f"there is no quantization to {bits} bits in blocks of {block}")
    numel = elements.numel()
    fits = (numel % block, data.numel(), scales.numel()) == (0, numel * bits // 8, numel // block)
    if not fits or data.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise ValueError(
            f"{numel} elements in blocks of {block} do not fit {data.numel()} bytes of {data.dtype} "
            f"and {scales.numel()} scales of {scales.dtype}"
        )
