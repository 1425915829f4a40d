"""From any format to fp32 and back, and the rows of a table of tensors.

``powertrain_triton.table`` makes the tables: one row for a piece of a tensor, in
int64: how many elements it has, whether all its addresses are multiples of 16,
which tensor it is of, and from ``ADDRESSES`` on where it begins in each list.
"""

from __future__ import annotations

import triton
import triton.language as tl

LENGTH = tl.constexpr(0)
ALIGNED = tl.constexpr(1)
TENSOR = tl.constexpr(2)
PARAM = tl.constexpr(3)
GRAD = tl.constexpr(4)
FIRST = tl.constexpr(5)
SECOND = tl.constexpr(6)
OUT = tl.constexpr(7)
WIDTH = tl.constexpr(8)


@triton.jit
def _probe():
    pass


INTERPRETED = tl.constexpr(not isinstance(_probe, triton.JITFunction))
"""Whether Triton's interpreter runs these kernels: it is chosen when they are decorated."""


@triton.jit
def widen(x):
    """Return ``x`` in fp32."""
    # The interpreter loses the denormals of bf16; on a device the conversion is one instruction, and exact.
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            wide = x.to(tl.float32)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Return fp32 ``x`` in another format, rounded to the nearest, ties to even."""
    # The interpreter cuts bits off where a device rounds, so it is told bit by bit.
    if INTERPRETED:
        if DTYPE == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
            small = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            small = x.to(DTYPE)
    else:
        small = x.to(DTYPE)
    return small


@triton.jit
def pointer(row, begin, COLUMN: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """Return where element ``begin`` of a row's piece lies in one of the lists."""
    place = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    if FULL:  # what comes out of a table has no known alignment: without this every element is moved alone
        place = tl.multiple_of(place, 16)
    return place + begin


@triton.jit
def read(row, begin, left, COLUMN: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Return BLOCK elements of one list in fp32; zeros beyond ``left``."""
    places = pointer(row, begin, COLUMN, DTYPE, FULL) + tl.arange(0, BLOCK)
    if FULL:
        x = tl.load(places)
    else:
        x = tl.load(places, mask=tl.arange(0, BLOCK) < left, other=0.0)
    return widen(x)


@triton.jit
def write(row, begin, left, x, COLUMN: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Round BLOCK elements to the format of one list and store them, as far as ``left``."""
    places = pointer(row, begin, COLUMN, DTYPE, FULL) + tl.arange(0, BLOCK)
    if FULL:
        tl.store(places, narrow(x, DTYPE))
    else:
        tl.store(places, narrow(x, DTYPE), mask=tl.arange(0, BLOCK) < left)


@triton.jit
def lerp(old, new, keep, take):
    """Return ``keep * old + take * new`` where the two add up to 1; exact at either end, as torch.lerp is."""
    step = new - old
    return tl.where(take < 0.5, tl.fma(step, take, old), tl.fma(step, -keep, new))


@triton.jit
def total(x, AXIS: tl.constexpr):
    """Return the sums over one axis."""
    # Of a triton that was imported before the interpreter was chosen, ``tl.sum`` is no function to interpret.
    if INTERPRETED:
        found = tl.reduce(x, AXIS, tl.standard._sum_combine)
    else:
        found = tl.sum(x, AXIS)
    return found


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """Return the largest over one axis."""
    if INTERPRETED:
        found = tl.reduce(x, AXIS, tl.standard._elementwise_max)
    else:
        found = tl.max(x, AXIS)
    return found
