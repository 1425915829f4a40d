"""Softmax and cross-entropy of given logits, with their gradient written over them: one program a row."""

from __future__ import annotations

import triton
import triton.language as tl

from powertrain_triton.device.formats import largest, narrow, total, widen


@triton.jit
def softmax_cross_entropy(
    logits, targets, losses, scale, ignored,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a row's loss, and, if GRADIENT, ``scale`` times its gradient in the logits' place.

    The largest logit and the sum of exponentials are found in one pass ("Online normalizer calculation for softmax",
    Milakov and Gimelshein, 2018).
    """
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * WIDTH
    target = tl.load(targets + index)
    kept = target != ignored
    if kept:
        # A target that is none of the classes is read from nowhere: its loss is NaN.
        chosen = widen(tl.load(row + target, mask=(target >= 0) & (target < WIDTH), other=float("nan")))
        most = float("-inf")
        mass = 0.0
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = widen(tl.load(row + column, mask=column < WIDTH, other=float("-inf")))
            new = tl.maximum(most, largest(x, 0))
            base = tl.where(new == float("-inf"), 0.0, new)  # of logits that are all masked so far nothing counts
            mass = mass * tl.exp(most - base) + total(tl.exp(x - base), 0)
            most = new
        tl.store(losses + index, tl.log(mass) - (chosen - most))  # a common offset is gone before it can round
        if GRADIENT:
            factor = tl.load(scale)
            # The threads that read a logit above need not be those that write over it below.
            tl.debug_barrier()
            for start in range(0, WIDTH, BLOCK):
                column = start + tl.arange(0, BLOCK)
                x = widen(tl.load(row + column, mask=column < WIDTH, other=float("-inf")))
                share = tl.exp(x - most) / mass
                share = tl.where(column == target, share - 1.0, share) * factor
                tl.store(row + column, narrow(share, DTYPE), mask=column < WIDTH)
    else:
        tl.store(losses + index, 0.0)
        if GRADIENT:
            for start in range(0, WIDTH, BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(row + column, narrow(tl.full((BLOCK,), 0.0, tl.float32), DTYPE), mask=column < WIDTH)
