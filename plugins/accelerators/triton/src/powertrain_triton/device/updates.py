"""Optimizer updates. Each element is read once and written once, whatever is done to it in between.

Formulas and their order are those of ``powertrain.kernels.updates``. Division
and root are the correctly rounded ones: a GPU waits for memory here, and has
time for them. A number that is zero is told by a flag, not by multiplying with
it: zero times infinity is no number. Where a product is added, it is not rounded
first: what is left of two numbers that cancel out is then as exact as torch's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powertrain_triton.device.formats import (
    ALIGNED,
    FIRST,
    GRAD,
    LENGTH,
    OUT,
    PARAM,
    SECOND,
    WIDTH,
    lerp,
    read,
    write,
)


@triton.jit
def locate(table, blocks, BLOCK: tl.constexpr):
    """Return this program's row, its first element there, how many there are, and whether its block is full."""
    index = tl.program_id(0)
    row = table + (index // blocks).to(tl.int64) * WIDTH
    begin = (index % blocks) * BLOCK
    left = (tl.load(row + LENGTH) - begin).to(tl.int32)
    full = (tl.load(row + ALIGNED) != 0) & (left >= BLOCK)
    return row, begin, left, full


@triton.jit
def gradient(row, begin, left, scale, GRADS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Return the gradients, scaled."""
    return read(row, begin, left, GRAD, GRADS, BLOCK, FULL) * tl.load(scale)


@triton.jit
def publish(row, begin, left, p, PARAMS: tl.constexpr, OUTS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Store new parameters, and their copy in another format where one is asked for."""
    write(row, begin, left, p, PARAM, PARAMS, BLOCK, FULL)
    if OUTS is not None:
        write(row, begin, left, p, OUT, OUTS, BLOCK, FULL)


@triton.jit
def _adam(
    row, begin, left, scale, keep1, take1, keep2, take2, eps, decay, step_size, root_bias2,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, STATE: tl.constexpr, OUTS: tl.constexpr,
    DECAY: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    g = gradient(row, begin, left, scale, GRADS, BLOCK, FULL)
    p = read(row, begin, left, PARAM, PARAMS, BLOCK, FULL)
    m = read(row, begin, left, FIRST, STATE, BLOCK, FULL)
    v = read(row, begin, left, SECOND, STATE, BLOCK, FULL)
    if DECAY == "decoupled":
        p = p * decay
    elif DECAY == "gradient":
        g = tl.fma(p, decay, g)
    m = lerp(m, g, keep1, take1)
    v = tl.fma(take2 * g, g, v * keep2)
    write(row, begin, left, m, FIRST, STATE, BLOCK, FULL)
    write(row, begin, left, v, SECOND, STATE, BLOCK, FULL)
    p = p - tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root_bias2) + eps)
    publish(row, begin, left, p, PARAMS, OUTS, BLOCK, FULL)


@triton.jit(do_not_specialize=["blocks"])
def adam(
    table, blocks, scale, keep1, take1, keep2, take2, eps, decay, step_size, root_bias2,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, STATE: tl.constexpr, OUTS: tl.constexpr,
    DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adam and AdamW. ``decay``: what multiplies parameters, where it is decoupled, or what of them is added."""
    row, begin, left, full = locate(table, blocks, BLOCK)
    if full:
        _adam(
            row, begin, left, scale, keep1, take1, keep2, take2, eps, decay, step_size, root_bias2,
            PARAMS, GRADS, STATE, OUTS, DECAY, BLOCK, True,
        )  # fmt: skip
    elif left > 0:
        _adam(
            row, begin, left, scale, keep1, take1, keep2, take2, eps, decay, step_size, root_bias2,
            PARAMS, GRADS, STATE, OUTS, DECAY, BLOCK, False,
        )  # fmt: skip


@triton.jit
def _lion(
    row, begin, left, scale, lr, keep1, take1, keep2, take2, shrink,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, STATE: tl.constexpr, OUTS: tl.constexpr,
    DECAY: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    g = gradient(row, begin, left, scale, GRADS, BLOCK, FULL)
    p = read(row, begin, left, PARAM, PARAMS, BLOCK, FULL)
    m = read(row, begin, left, FIRST, STATE, BLOCK, FULL)
    if DECAY:
        p = p * shrink
    blend = tl.fma(g, take1, m * keep1)
    sign = tl.where(blend > 0, 1.0, tl.where(blend < 0, -1.0, 0.0))  # of NaN it is 0, as torch has it
    write(row, begin, left, tl.fma(g, take2, m * keep2), FIRST, STATE, BLOCK, FULL)
    publish(row, begin, left, tl.fma(sign, -lr, p), PARAMS, OUTS, BLOCK, FULL)


@triton.jit(do_not_specialize=["blocks"])
def lion(
    table, blocks, scale, lr, keep1, take1, keep2, take2, shrink,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, STATE: tl.constexpr, OUTS: tl.constexpr,
    DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lion; ``shrink`` multiplies the parameters where DECAY says so."""
    row, begin, left, full = locate(table, blocks, BLOCK)
    if full:
        _lion(
            row, begin, left, scale, lr, keep1, take1, keep2, take2, shrink,
            PARAMS, GRADS, STATE, OUTS, DECAY, BLOCK, True,
        )  # fmt: skip
    elif left > 0:
        _lion(
            row, begin, left, scale, lr, keep1, take1, keep2, take2, shrink,
            PARAMS, GRADS, STATE, OUTS, DECAY, BLOCK, False,
        )  # fmt: skip


@triton.jit
def _adagrad(
    row, begin, left, scale, rate, eps, decay,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, STATE: tl.constexpr, OUTS: tl.constexpr,
    DECAY: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    g = gradient(row, begin, left, scale, GRADS, BLOCK, FULL)
    p = read(row, begin, left, PARAM, PARAMS, BLOCK, FULL)
    total = read(row, begin, left, FIRST, STATE, BLOCK, FULL)
    if DECAY:
        g = tl.fma(p, decay, g)
    total = tl.fma(g, g, total)
    write(row, begin, left, total, FIRST, STATE, BLOCK, FULL)
    p = p - tl.div_rn(rate * g, tl.sqrt_rn(total) + eps)
    publish(row, begin, left, p, PARAMS, OUTS, BLOCK, FULL)


@triton.jit(do_not_specialize=["blocks"])
def adagrad(
    table, blocks, scale, rate, eps, decay,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, STATE: tl.constexpr, OUTS: tl.constexpr,
    DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adagrad; ``rate`` is this step's learning rate."""
    row, begin, left, full = locate(table, blocks, BLOCK)
    if full:
        _adagrad(row, begin, left, scale, rate, eps, decay, PARAMS, GRADS, STATE, OUTS, DECAY, BLOCK, True)
    elif left > 0:
        _adagrad(row, begin, left, scale, rate, eps, decay, PARAMS, GRADS, STATE, OUTS, DECAY, BLOCK, False)


@triton.jit
def _momentum(
    row, begin, left, scale, lr, keep, take, decay,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, STATE: tl.constexpr, OUTS: tl.constexpr,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, FRESH: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    g = gradient(row, begin, left, scale, GRADS, BLOCK, FULL)
    p = read(row, begin, left, PARAM, PARAMS, BLOCK, FULL)
    if DECAY:
        g = tl.fma(p, decay, g)
    if STATE is not None:
        if FRESH:
            m = g
        else:
            m = tl.fma(g, take, read(row, begin, left, FIRST, STATE, BLOCK, FULL) * keep)
        write(row, begin, left, m, FIRST, STATE, BLOCK, FULL)
        if NESTEROV:
            g = tl.fma(m, keep, g)
        else:
            g = m
    publish(row, begin, left, tl.fma(g, -lr, p), PARAMS, OUTS, BLOCK, FULL)


@triton.jit(do_not_specialize=["blocks"])
def momentum(
    table, blocks, scale, lr, keep, take, decay,
    PARAMS: tl.constexpr, GRADS: tl.constexpr, STATE: tl.constexpr, OUTS: tl.constexpr,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, FRESH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient descent, with momentum where there is STATE; FRESH: the momentum is the gradient itself."""
    row, begin, left, full = locate(table, blocks, BLOCK)
    if full:
        _momentum(
            row, begin, left, scale, lr, keep, take, decay,
            PARAMS, GRADS, STATE, OUTS, DECAY, NESTEROV, FRESH, BLOCK, True,
        )  # fmt: skip
    elif left > 0:
        _momentum(
            row, begin, left, scale, lr, keep, take, decay,
            PARAMS, GRADS, STATE, OUTS, DECAY, NESTEROV, FRESH, BLOCK, False,
        )  # fmt: skip
