"""Rotary embedding of queries and keys in one launch: a program turns all heads of one token."""

from __future__ import annotations

import triton
import triton.language as tl

from powertrain_triton.device.formats import narrow, widen


@triton.jit
def _turn(
    x, out, x_head, out_head, cos1, cos2, sin1, sin2,
    HEADS: tl.constexpr, DIM: tl.constexpr, DTYPE: tl.constexpr,
    TILE: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, TILE)[:, None]
    column = tl.arange(0, HALF)[None, :]
    mask = (head < HEADS) & (column < DIM // 2)
    first = widen(tl.load(x + head * x_head + column, mask=mask, other=0.0))
    second = widen(tl.load(x + head * x_head + column + DIM // 2, mask=mask, other=0.0))
    if BACK:
        left = first * cos1 + second * sin2
        right = second * cos2 - first * sin1
    else:
        left = first * cos1 - second * sin1
        right = second * cos2 + first * sin2
    tl.store(out + head * out_head + column, narrow(left, DTYPE), mask=mask)
    tl.store(out + head * out_head + column + DIM // 2, narrow(right, DTYPE), mask=mask)


@triton.jit
def turn(
    q, k, q_out, k_out, cos, sin, length,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    table_batch,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, Q_DTYPE: tl.constexpr, K_DTYPE: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Turn all heads of one token; BACK: the transposed turn, which is the gradient's.

    Numbers named ``x_head`` are distances in elements between neighbours; ``table_batch`` is 0 where all of the batch
    share the angles.
    """
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    inside = column < DIM // 2
    angles = batch * table_batch + token * DIM
    cos1 = widen(tl.load(cos + angles + column, mask=inside, other=0.0))
    cos2 = widen(tl.load(cos + angles + column + DIM // 2, mask=inside, other=0.0))
    sin1 = widen(tl.load(sin + angles + column, mask=inside, other=0.0))
    sin2 = widen(tl.load(sin + angles + column + DIM // 2, mask=inside, other=0.0))
    _turn(
        q + batch * q_batch + token * q_token, q_out + batch * q_out_batch + token * q_out_token, q_head, q_out_head,
        cos1, cos2, sin1, sin2, Q_HEADS, DIM, Q_DTYPE, Q_TILE, HALF, BACK,
    )  # fmt: skip
    _turn(
        k + batch * k_batch + token * k_token, k_out + batch * k_out_batch + token * k_out_token, k_head, k_out_head,
        cos1, cos2, sin1, sin2, K_HEADS, DIM, K_DTYPE, K_TILE, HALF, BACK,
    )  # fmt: skip
