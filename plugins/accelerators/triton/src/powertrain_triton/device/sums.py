"""Sums: of squares, and of several arrays into one. Nothing is added atomically, so equal inputs give equal bits."""

from __future__ import annotations

import triton
import triton.language as tl

from powertrain_triton.device.formats import PARAM, narrow, read, widen
from powertrain_triton.device.updates import locate


@triton.jit(do_not_specialize=["blocks"])
def squares(table, blocks, partial, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of each block's squares, in fp64, to ``partial`` (programs)."""
    row, begin, left, full = locate(table, blocks, BLOCK)
    place = partial + tl.program_id(0)
    if full:
        x = read(row, begin, left, PARAM, DTYPE, BLOCK, True).to(tl.float64)
        tl.store(place, tl.sum(x * x, 0))
    else:
        x = read(row, begin, left, PARAM, DTYPE, BLOCK, False).to(tl.float64)
        tl.store(place, tl.sum(x * x, 0))


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
    total = tl.zeros((BLOCK,), tl.float64)
    # No range: Triton 3.6's interpreter cannot make an index of a number under numpy 2.4.
    while start < end:
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partial + index * COLUMNS + column, mask=index < end, other=0.0)
        start += BLOCK
    tl.store(out + tensor * COLUMNS + column, tl.sum(total, 0).to(tl.float32))


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
    total = _term(addresses + 1, base, index, mask, DTYPE, ALIGNED, NARROW)
    for term in tl.static_range(1, TERMS):
        x = _term(addresses + 1 + term, base, index, mask, DTYPE, ALIGNED, NARROW)
        if HOW == "max":  # what is not a number is not equal to itself, and stays
            total = tl.where((total > x) | (total != total), total, x)
        elif HOW == "min":
            total = tl.where((total < x) | (total != total), total, x)
        else:
            total = total + x
    if HOW == "mean":
        if DTYPE == tl.float64:
            total = total / tl.load(divisor)
        else:
            total = tl.div_rn(total, tl.load(divisor))
    if NARROW:
        total = narrow(total, DTYPE)
    place = tl.load(addresses).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        place = tl.multiple_of(place, 16)
    tl.store(place + base + index, total, mask=mask)
