"""Sums: of squares, and of several arrays into one. Nothing is added atomically, so equal inputs give equal bits."""

from __future__ import annotations

import triton
import triton.language as tl

from powertrain_triton.device.formats import PARAM, narrow, read, total, widen
from powertrain_triton.device.updates import locate


@triton.jit(do_not_specialize=["blocks"])
def squares(table, blocks, partial, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of each block's squares, in fp64, to ``partial`` (programs)."""
    row, begin, left, full = locate(table, blocks, BLOCK)
    place = partial + tl.program_id(0)
    if full:
        x = read(row, begin, left, PARAM, DTYPE, BLOCK, True).to(tl.float64)
        tl.store(place, total(x * x, 0))
    else:
        x = read(row, begin, left, PARAM, DTYPE, BLOCK, False).to(tl.float64)
        tl.store(place, total(x * x, 0))


@triton.jit(do_not_specialize=["blocks"])
def gather(partial, ends, blocks, out, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up a tensor's blocks: one program for each tensor and column.

    ``ends`` (tensors + 1) counts the rows of the table before each tensor; ``partial`` (rows * blocks, COLUMNS) in
    fp64 becomes ``out`` (tensors, COLUMNS) in fp32.
    """
    tensor = tl.program_id(0)
    column = tl.program_id(1)
    start = tl.load(ends + tensor) * blocks
    end = tl.load(ends + tensor + 1) * blocks
    result = tl.full((BLOCK,), 0.0, tl.float64)
    # No range: Triton 3.6's interpreter cannot make an index of a number under numpy 2.4.
    while start < end:
        index = start + tl.arange(0, BLOCK)
        result += tl.load(partial + index * COLUMNS + column, mask=index < end, other=0.0)
        start += BLOCK
    tl.store(out + tensor * COLUMNS + column, total(result, 0).to(tl.float32))


@triton.jit
def _term(addresses, base, index, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, NARROW: tl.constexpr):
    place = tl.load(addresses).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        place = tl.multiple_of(place, 16)
    x = tl.load(place + base + index, mask=mask)
    if NARROW:
        x = widen(x)
    return x


@triton.jit
def combine(
    addresses, numel, divisor,
    DTYPE: tl.constexpr, TERMS: tl.constexpr, HOW: tl.constexpr, NARROW: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Combine TERMS arrays in their order into one; ``addresses``: of the result, and of each term.

    ``divisor`` points at the number of terms, in the format in which they are added.
    """
    base = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    mask = base + index < numel
    result = _term(addresses + 1, base, index, mask, DTYPE, ALIGNED, NARROW)
    for term in tl.static_range(1, TERMS):
        x = _term(addresses + 1 + term, base, index, mask, DTYPE, ALIGNED, NARROW)
        if HOW == "max":  # what is not a number is not equal to itself, and stays
            result = tl.where((result > x) | (result != result), result, x)
        elif HOW == "min":
            result = tl.where((result < x) | (result != result), result, x)
        else:
            result = result + x
    if HOW == "mean":
        if DTYPE == tl.float64:
            result = result / tl.load(divisor)
        else:
            result = tl.div_rn(result, tl.load(divisor))
    if NARROW:
        result = narrow(result, DTYPE)
    place = tl.load(addresses).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        place = tl.multiple_of(place, 16)
    tl.store(place + base + index, result, mask=mask)
