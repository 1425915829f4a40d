"""Blockwise quantization, bit by bit that of ``powertrain.kernels.blockwise``.

Division is the correctly rounded one, and launches forbid the fusion of a
product with a sum: either would change bytes. A tile is some blocks, in halves,
as four-bit elements are packed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powertrain_triton.device.formats import largest, narrow, widen


@triton.jit
def _magnitude(x):
    """Return magnitudes as integers: they are ordered alike, with NaN above infinity, so that a maximum finds it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _integers(x, steps, top):
    """Return the nearest integers, ties to even, within ±top; 1 for what is no number."""
    ratio = tl.div_rn(x, steps)
    # Beside 1.5 * 2**23 fp32 has no room for a fraction; ratios are far below 2**22, or infinite.
    ratio = (ratio + 12582912.0) - 12582912.0
    ratio = tl.where(ratio > top, top, tl.where(ratio < -top, -top, ratio))
    return tl.where(ratio == ratio, ratio, 1.0).to(tl.int32)


@triton.jit
def quantize(
    values, data, scales, blocks, top, limit,
    BITS: tl.constexpr, LENGTH: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Quantize blocks of LENGTH elements; HALF is a power of two, half a block or more."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HALF)
    there = row < blocks
    mask = there[:, None] & (column < LENGTH // 2)[None, :]
    low_at = row[:, None] * LENGTH + column[None, :]
    high_at = low_at + LENGTH // 2
    low = widen(tl.load(values + low_at, mask=mask, other=0.0))
    high = widen(tl.load(values + high_at, mask=mask, other=0.0))
    most = largest(tl.maximum(_magnitude(low), _magnitude(high)), 1)
    found = tl.div_rn(most.to(tl.float32, bitcast=True), tl.full((ROWS,), 0.0, tl.float32) + top)
    # Rounded up, the scale of the largest floats would make them infinite.
    found = tl.where((most < 0x7F800000) & (found > limit), limit, found)
    tl.store(scales + row, found, mask=there)
    steps = (tl.where(found == 0.0, 1.0, found))[:, None] + tl.full((ROWS, HALF), 0.0, tl.float32)
    low = _integers(low, steps, top)
    high = _integers(high, steps, top)
    if BITS == 8:
        tl.store(data + low_at, low.to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)
        tl.store(data + high_at, high.to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)
    else:
        packed = (low + 8) | ((high + 8) << 4)
        tl.store(data + row[:, None] * (LENGTH // 2) + column[None, :], packed.to(tl.uint8), mask=mask)


@triton.jit
def _put(out, place, x, mask, DTYPE: tl.constexpr, ADD: tl.constexpr):
    if ADD:
        x = widen(tl.load(out + place, mask=mask, other=0.0)) + x
    tl.store(out + place, narrow(x, DTYPE), mask=mask)


@triton.jit
def dequantize(
    data, scales, out, blocks,
    DTYPE: tl.constexpr, BITS: tl.constexpr, ADD: tl.constexpr,
    LENGTH: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Fill ``out`` with what ``quantize`` made bytes of, or ADD it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HALF)
    there = row < blocks
    mask = there[:, None] & (column < LENGTH // 2)[None, :]
    low_at = row[:, None] * LENGTH + column[None, :]
    high_at = low_at + LENGTH // 2
    factors = tl.load(scales + row, mask=there, other=0.0)[:, None]
    if BITS == 8:
        low = tl.load(data + low_at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        high = tl.load(data + high_at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    else:
        packed = tl.load(data + row[:, None] * (LENGTH // 2) + column[None, :], mask=mask, other=0).to(tl.int32)
        low = ((packed & 15) - 8).to(tl.float32)
        high = ((packed >> 4) - 8).to(tl.float32)
    _put(out, low_at, low * factors, mask, DTYPE, ADD)
    _put(out, high_at, high * factors, mask, DTYPE, ADD)
