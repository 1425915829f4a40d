"""LAMB in two kernels: moments and norms, and, once the norms of all ranks are known, the step."""

from __future__ import annotations

import triton
import triton.language as tl

from powertrain_triton.device.formats import FIRST, PARAM, SECOND, TENSOR, lerp, read, total, write
from powertrain_triton.device.updates import gradient, locate, publish


@triton.jit
def _direction(p, m, v, bias1, root_bias2, eps, decay):
    return tl.fma(p, decay, tl.div_rn(tl.div_rn(m, bias1), tl.div_rn(tl.sqrt_rn(v), root_bias2) + eps))


@triton.jit
def _moments(
    row, begin, left, scale, keep1, take1, keep2, take2, eps, decay, bias1, root_bias2,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    g = gradient(row, begin, left, scale, GRADS, BLOCK, FULL)
    p = read(row, begin, left, PARAM, PARAMS, BLOCK, FULL)
    m = lerp(read(row, begin, left, FIRST, STATE, BLOCK, FULL), g, keep1, take1)
    v = tl.fma(take2 * g, g, read(row, begin, left, SECOND, STATE, BLOCK, FULL) * keep2)
    write(row, begin, left, m, FIRST, STATE, BLOCK, FULL)
    write(row, begin, left, v, SECOND, STATE, BLOCK, FULL)
    # Beyond the end everything is zero, unless eps is: 0 / 0 must not reach the sum.
    there = tl.arange(0, BLOCK) < left
    way = tl.where(there, _direction(p, m, v, bias1, root_bias2, eps, decay), 0.0).to(tl.float64)
    wide = p.to(tl.float64)
    return total(wide * wide, 0), total(way * way, 0)


@triton.jit(do_not_specialize=["blocks"])
def moments(
    table, blocks, partial, scale, keep1, take1, keep2, take2, eps, decay, bias1, root_bias2,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the moments; ``partial`` (programs, 2) in fp64 gets this block's squares, of parameters and direction."""
    row, begin, left, full = locate(table, blocks, BLOCK)
    place = partial + tl.program_id(0).to(tl.int64) * 2
    if full:
        first, second = _moments(
            row, begin, left, scale, keep1, take1, keep2, take2, eps, decay, bias1, root_bias2,
            PARAMS, GRADS, STATE, BLOCK, True,
        )  # fmt: skip
        tl.store(place, first)
        tl.store(place + 1, second)
    else:
        first, second = _moments(
            row, begin, left, scale, keep1, take1, keep2, take2, eps, decay, bias1, root_bias2,
            PARAMS, GRADS, STATE, BLOCK, False,
        )  # fmt: skip
        tl.store(place, first)
        tl.store(place + 1, second)


@triton.jit
def _apply(
    row, begin, left, rates, eps, decay, bias1, root_bias2,
    PARAMS: tl.constexpr, STATE: tl.constexpr, OUTS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    p = read(row, begin, left, PARAM, PARAMS, BLOCK, FULL)
    m = read(row, begin, left, FIRST, STATE, BLOCK, FULL)
    v = read(row, begin, left, SECOND, STATE, BLOCK, FULL)
    rate = tl.load(rates + tl.load(row + TENSOR))
    p = tl.fma(_direction(p, m, v, bias1, root_bias2, eps, decay), -rate, p)
    publish(row, begin, left, p, PARAMS, OUTS, BLOCK, FULL)


@triton.jit(do_not_specialize=["blocks"])
def apply(
    table, blocks, rates, eps, decay, bias1, root_bias2,
    PARAMS: tl.constexpr, STATE: tl.constexpr, OUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move each parameter by its rate in its direction."""
    row, begin, left, full = locate(table, blocks, BLOCK)
    if full:
        _apply(row, begin, left, rates, eps, decay, bias1, root_bias2, PARAMS, STATE, OUTS, BLOCK, True)
    elif left > 0:
        _apply(row, begin, left, rates, eps, decay, bias1, root_bias2, PARAMS, STATE, OUTS, BLOCK, False)
