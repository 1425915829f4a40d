"""SwiGLU, forward and backward, element by element."""

from __future__ import annotations

import triton
import triton.language as tl

from powertrain_triton.device.formats import narrow, widen


@triton.jit
def forward(gate, up, out, numel, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``silu(gate) * up``."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    mask = start + index < numel
    g = widen(tl.load(gate + start + index, mask=mask, other=0.0))
    u = widen(tl.load(up + start + index, mask=mask, other=0.0))
    tl.store(out + start + index, narrow(g / (1.0 + tl.exp(-g)) * u, DTYPE), mask=mask)


@triton.jit
def backward(slope, gate, up, to_gate, to_up, numel, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradients of both from that of the result, ``slope``."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    mask = start + index < numel
    d = widen(tl.load(slope + start + index, mask=mask, other=0.0))
    g = widen(tl.load(gate + start + index, mask=mask, other=0.0))
    u = widen(tl.load(up + start + index, mask=mask, other=0.0))
    share = 1.0 / (1.0 + tl.exp(-g))
    tl.store(to_gate + start + index, narrow(d * u * share * (1.0 + g * (1.0 - share)), DTYPE), mask=mask)
    tl.store(to_up + start + index, narrow(d * (g * share), DTYPE), mask=mask)
