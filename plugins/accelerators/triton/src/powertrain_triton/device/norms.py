"""RMSNorm and LayerNorm, forward and backward: a tile of some whole rows at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from powertrain_triton.device.formats import narrow, total, widen


@triton.jit
def forward(
    x, weight, bias, y, means, factors, rows, eps,
    DTYPE: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Norm ROWS rows; ``means`` (where CENTRED) and ``factors``, (rows) in fp32, are for backward."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    mask = (row < rows)[:, None] & inside[None, :]
    place = row[:, None] * DIM + column[None, :]
    value = widen(tl.load(x + place, mask=mask, other=0.0))
    if CENTRED:
        mean = total(value, 1) / DIM
        tl.store(means + row, mean, mask=row < rows)
        value = tl.where(inside[None, :], value - mean[:, None], 0.0)
    factor = 1.0 / tl.sqrt_rn(total(value * value, 1) / DIM + eps)
    tl.store(factors + row, factor, mask=row < rows)
    value = value * factor[:, None] * widen(tl.load(weight + column, mask=inside, other=0.0))[None, :]
    if BIASED:
        value = value + widen(tl.load(bias + column, mask=inside, other=0.0))[None, :]
    tl.store(y + place, narrow(value, DTYPE), mask=mask)


@triton.jit
def backward(
    slope, x, weight, means, factors, out, weights, biases, rows, tiles,
    DTYPE: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turn the gradient of the result, ``slope``, into that of ``x``, tile after tile.

    What a program's tiles add to the gradients of weight and bias goes to its row of ``weights`` and ``biases``
    (programs, DIM), in fp32; their sum over the programs is the caller's, in one fixed order.
    """
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    w = widen(tl.load(weight + column, mask=inside, other=0.0))[None, :]
    to_weight = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    to_bias = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    tile = tl.program_id(0)
    # No range: Triton 3.6's interpreter cannot make an index of a number under numpy 2.4.
    while tile < tiles:
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        place = row[:, None] * DIM + column[None, :]
        d = widen(tl.load(slope + place, mask=mask, other=0.0))
        value = widen(tl.load(x + place, mask=mask, other=0.0))
        factor = tl.load(factors + row, mask=row < rows, other=0.0)[:, None]
        if CENTRED:
            value = value - tl.load(means + row, mask=row < rows, other=0.0)[:, None]
        value = tl.where(inside[None, :], value * factor, 0.0)
        to_weight += d * value
        if BIASED:
            to_bias += d
        d = d * w
        change = d - value * (total(d * value, 1) / DIM)[:, None]
        if CENTRED:
            change = change - (total(d, 1) / DIM)[:, None]
        tl.store(out + place, narrow(change * factor, DTYPE), mask=mask)
        tile += tl.num_programs(0)
    at = tl.program_id(0).to(tl.int64) * DIM + column
    tl.store(weights + at, total(to_weight, 0), mask=inside)
    if BIASED:
        tl.store(biases + at, total(to_bias, 0), mask=inside)
