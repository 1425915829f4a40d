"""One small case of each kernel: what goes in, and everything that may come out.

``run`` calls a kernel or its reference with the same numbers, wherever it computes, and returns what it gave and what
it left in the tensors that it was given, on the host. Sizes are odd: vectors of no instruction set divide them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from powertrain.kernels.updates import Operands

SIZES = (1, 37, 1031)
"""Elements of each parameter: alone, less than a block, and more than one."""

EXACT = frozenset({"combine", "quantize", "dequantize"})
"""Kernels of which each bit is fixed."""

TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (1.6e-2, 1e-3)}
"""How far a number may be off, relatively and absolutely: a few roundings, sums in another order."""

Kernel = Callable[..., Any]
Draw = Callable[..., torch.Tensor]
Case = Callable[[Kernel, Draw], Sequence[torch.Tensor]]

BETAS: Mapping[str, Any] = {"beta1": 0.9, "beta2": 0.99}


def run(name: str, function: Kernel, device: torch.device) -> list[torch.Tensor]:
    """Return all that ``function``, the kernel called ``name`` or its reference, makes of the case on ``device``."""
    generator = torch.Generator().manual_seed(17)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    return [tensor.detach().cpu() for tensor in CASES[name](function, draw)]


def difference(name: str, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    """Return in words where two results of ``run`` differ, or None where they agree."""
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        rtol, atol = (0.0, 0.0) if name in EXACT else TOLERANCES.get(theirs.dtype, (0.0, 0.0))
        try:
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            return f"{name}: tensor {index} of {len(expected)} is not what the reference gives: {error}"
    return None


def _update(states: int, *, outs: bool = True, **numbers: Any) -> Case:
    """Return a case of an update with so many moments, whose new values go out in bf16 as well."""

    def case(function: Kernel, draw: Draw) -> list[torch.Tensor]:
        params, grads, firsts = ([draw(size) for size in SIZES] for _ in range(3))
        seconds = [draw(size).square() for size in SIZES]
        firsts = [first.abs() for first in firsts]  # of Adagrad these are sums of squares
        copies = [draw(size, dtype=torch.bfloat16) for size in SIZES] if outs else []
        operands = Operands(params, grads, firsts, seconds if states > 1 else (), copies)
        result = function(operands, **numbers)
        touched = [*params, *grads, *firsts, *operands.seconds, *copies]
        return touched if result is None else [result, *touched]

    return case


def _lamb_apply(function: Kernel, draw: Draw) -> list[torch.Tensor]:
    case = _update(2, rates=draw(len(SIZES)).abs(), step=3, eps=1e-6, weight_decay=0.1, **BETAS)
    return [*case(function, draw)]


def _sums_of_squares(function: Kernel, draw: Draw) -> list[torch.Tensor]:
    return [function([draw(size, dtype=dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)])]


def _combine(function: Kernel, draw: Draw) -> list[torch.Tensor]:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for reduction in ("sum", "mean", "max", "min"):
            terms = [draw(1031, dtype=dtype) for _ in range(3)]
            apart = torch.empty_like(terms[0])
            function(apart, terms, reduction)
            function(terms[1], terms, reduction)  # into one of them
            results += [apart, *terms]
    return results


def _quantize(function: Kernel, draw: Draw) -> list[torch.Tensor]:
    results = []
    for bits in (8, 4):
        values = draw(1024)
        data = torch.zeros(1024 * bits // 8, dtype=torch.uint8, device=values.device)
        scales = torch.zeros(4, device=values.device)
        function(values, data, scales, bits=bits, block=256)
        results += [data, scales, values]
    return results


def _dequantize(function: Kernel, draw: Draw) -> list[torch.Tensor]:
    results = []
    for bits in (8, 4):
        # Bytes of no sum: 128 of 8 bits, and 0 of 4, are never written.
        data = (draw(1024 * bits // 8) * 30).clamp(-100, 100).to(torch.int8).view(torch.uint8)
        data = data if bits == 8 else data & 0x77 | 0x11
        # With powers of two there is nothing to round, whether a device fuses multiplication and addition or not.
        scales = torch.tensor([0.5, 1.0, 4.0, 0.25], device=data.device)
        for add in (False, True):
            out = (draw(1024) * 64).round() / 8
            function(data, scales, out, bits=bits, block=256, add=add)
            results.append(out)
    return results


def _layer(make: Callable[[Kernel, Sequence[torch.Tensor]], Any], *shapes: Sequence[int]) -> Case:
    """Return a case of a differentiable kernel: its results, and the gradient of each argument."""

    def case(function: Kernel, draw: Draw) -> list[torch.Tensor]:
        inputs = [draw(*shape).requires_grad_() for shape in shapes]
        made = make(function, inputs)
        results = [made] if isinstance(made, torch.Tensor) else [*made]
        gradients = torch.autograd.grad(results, inputs, [draw(*result.shape) for result in results])
        return [*results, *gradients]

    return case


def _rotary(function: Kernel, inputs: Sequence[torch.Tensor]) -> Any:
    angles = torch.linspace(0, 3, 7 * 16, device=inputs[0].device).view(7, 16)
    return function(*inputs, angles.cos(), angles.sin())


def _targets(count: int, classes: int, device: torch.device) -> torch.Tensor:
    targets = torch.arange(count, device=device) * 5 % classes
    targets[2] = -100
    return targets


def _softmax_cross_entropy(function: Kernel, draw: Draw) -> list[torch.Tensor]:
    logits = draw(9, 67)
    return [function(logits, _targets(9, 67, logits.device), 0.5), logits]


def _cross_entropy(function: Kernel, inputs: Sequence[torch.Tensor]) -> Any:
    return function(*inputs, _targets(9, 67, inputs[0].device), chunk=4)


CASES: Mapping[str, Case] = {
    "adam": _update(2, step=3, lr=0.01, eps=1e-8, weight_decay=0.1, decoupled=True, scale=0.5, **BETAS),
    "lion": _update(1, lr=0.01, weight_decay=0.1, scale=0.5, **BETAS),
    "adagrad": _update(1, step=3, lr=0.01, lr_decay=0.1, eps=1e-8, weight_decay=0.1, scale=0.5),
    "momentum": _update(
        1, lr=0.01, momentum=0.9, dampening=0.1, nesterov=True, weight_decay=0.1, first_time=False, scale=0.5
    ),
    "lamb_moments": _update(2, outs=False, step=3, eps=1e-6, weight_decay=0.1, scale=0.5, **BETAS),
    "lamb_apply": _lamb_apply,
    "sums_of_squares": _sums_of_squares,
    "combine": _combine,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "rms_norm": _layer(lambda function, inputs: function(*inputs, 1e-6), (5, 48), (48,)),
    "layer_norm": _layer(lambda function, inputs: function(*inputs, 1e-6), (5, 48), (48,), (48,)),
    "rotary": _layer(_rotary, (2, 4, 7, 16), (2, 2, 7, 16)),
    "swiglu": _layer(lambda function, inputs: function(*inputs), (5, 37), (5, 37)),
    "softmax_cross_entropy": _softmax_cross_entropy,
    "cross_entropy": _layer(_cross_entropy, (9, 32), (67, 32)),
}
"""The case of each name in ``powertrain.kernels.NAMES``."""
