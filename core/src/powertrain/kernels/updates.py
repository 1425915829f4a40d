"""Optimizer updates over lists of tensors: scale, update and cast, in one call.

Each takes its tensors as ``Operands`` and changes them in place. Arithmetic is
in fp32 whatever the tensors rest in (the reference computes on fp64 parameters in
fp64; devices need not take them), formulas are those of ``torch.optim``, and
``scale`` multiplies every gradient first: one number for the loss scale and for
clipping together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import attrs
import torch


@attrs.frozen
class Operands:
    """The tensors of one update; each list has one entry a parameter, of the parameter's number of elements.

    All are contiguous and on one device; those of one list have one dtype.

    Attributes:
        params: what is updated: fp32, bf16 or fp16; the reference takes fp64 as well.
        grads: fp32, bf16 or fp16; left as they are.
        firsts: momentum, first moment, or sum of squares: fp32 or bf16; empty where a rule has none.
        seconds: second moment, likewise.
        outs: where the new values go as well, in a format of their own; empty for nowhere.
    """

    params: Sequence[torch.Tensor]
    grads: Sequence[torch.Tensor]
    firsts: Sequence[torch.Tensor] = ()
    seconds: Sequence[torch.Tensor] = ()
    outs: Sequence[torch.Tensor] = ()


def _width(param: torch.Tensor) -> torch.dtype:
    """Return the format in which a parameter is computed: the wider of its own and fp32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@contextmanager
def _wide(dtype: torch.dtype, *tensors: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """Let a block work in a wide format on tensors of any; what it leaves there is rounded back."""
    wide = [torch.empty(0) if tensor is None else tensor.to(dtype) for tensor in tensors]
    yield wide
    for tensor, value in zip(tensors, wide, strict=True):
        if tensor is not None and tensor is not value:
            tensor.copy_(value)


def _rows(operands: Operands) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield each parameter's param, grad, first, second and out, the latter three None where there is none."""
    nothing = [None] * len(operands.params)
    yield from zip(
        operands.params,
        operands.grads,
        operands.firsts or nothing,
        operands.seconds or nothing,
        operands.outs or nothing,
        strict=True,
    )


def _publish(out: torch.Tensor | None, param: torch.Tensor) -> None:
    if out is not None:
        out.copy_(param.view_as(out))


def corrections(step: int, beta1: float, beta2: float) -> tuple[float, float]:
    """Return what Adam divides its first moment by, and the root of its second, in step ``step``, counted from 1."""
    return 1 - beta1**step, math.sqrt(1 - beta2**step)


@torch.no_grad()
def adam(
    operands: Operands,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    scale: float | torch.Tensor = 1.0,
) -> None:
    """Update by Adam ("Adam", Kingma and Ba, 2014), or by AdamW where the decay is decoupled (Loshchilov, 2017).

    Args:
        operands: params, grads, firsts and seconds, and maybe outs.
        step: of this update, counted from 1.
        lr: the learning rate.
        beta1: how much of the first moment stays.
        beta2: how much of the second moment stays.
        eps: added to the root of the second moment.
        weight_decay: how much of the parameters goes into the gradient, or, decoupled, off the parameters.
        decoupled: which of the two.
        scale: multiplies the gradients first.
    """
    bias1, root_bias2 = corrections(step, beta1, beta2)
    for param, grad, first, second, out in _rows(operands):
        with _wide(_width(param), param, first, second) as (p, m, v):
            g = grad.to(p.dtype).view_as(p) * scale
            if weight_decay and decoupled:
                p.mul_(1 - lr * weight_decay)
            elif weight_decay:
                g.add_(p, alpha=weight_decay)
            m, v = m.view_as(p), v.view_as(p)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p.addcdiv_(m, (v.sqrt() / root_bias2).add_(eps), value=-lr / bias1)
            _publish(out, p)


@torch.no_grad()
def lion(
    operands: Operands,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    scale: float | torch.Tensor = 1.0,
) -> None:
    """Update by Lion ("Symbolic Discovery of Optimization Algorithms", Chen et al., 2023); its state is ``firsts``."""
    for param, grad, first, _, out in _rows(operands):
        with _wide(_width(param), param, first) as (p, m):
            g, m = grad.to(p.dtype).view_as(p) * scale, m.view_as(p)
            if weight_decay:
                p.mul_(1 - lr * weight_decay)
            p.add_((m * beta1).add_(g, alpha=1 - beta1).sign_(), alpha=-lr)
            m.mul_(beta2).add_(g, alpha=1 - beta2)
            _publish(out, p)


@torch.no_grad()
def adagrad(
    operands: Operands,
    *,
    step: int,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    scale: float | torch.Tensor = 1.0,
) -> None:
    """Update by Adagrad (Duchi, Hazan and Singer, 2011); the sums of squares are ``firsts``."""
    rate = lr / (1 + (step - 1) * lr_decay)
    for param, grad, first, _, out in _rows(operands):
        with _wide(_width(param), param, first) as (p, total):
            g, total = grad.to(p.dtype).view_as(p) * scale, total.view_as(p)
            if weight_decay:
                g.add_(p, alpha=weight_decay)
            total.addcmul_(g, g, value=1)
            p.addcdiv_(g, total.sqrt().add_(eps), value=-rate)
            _publish(out, p)


@torch.no_grad()
def momentum(
    operands: Operands,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    first_time: bool,
    scale: float | torch.Tensor = 1.0,
) -> None:
    """Update by stochastic gradient descent, with momentum where there are ``firsts``.

    At the first time the momentum is the gradient itself, whatever ``firsts`` hold, as torch has it.
    """
    for param, grad, first, _, out in _rows(operands):
        with _wide(_width(param), param, first) as (p, m):
            g = grad.to(p.dtype).view_as(p) * scale
            if weight_decay:
                g.add_(p, alpha=weight_decay)
            if first is not None:
                m = m.view_as(p)
                if first_time:
                    m.copy_(g)
                else:
                    m.mul_(momentum).add_(g, alpha=1 - dampening)
                g = g.add_(m, alpha=momentum) if nesterov else m
            p.add_(g, alpha=-lr)
            _publish(out, p)


def _lamb_direction(
    p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, bias1: float, root_bias2: float, eps: float, weight_decay: float
) -> torch.Tensor:
    return (m / bias1).div_((v.sqrt() / root_bias2).add_(eps)).add_(p, alpha=weight_decay)


@torch.no_grad()
def lamb_moments(
    operands: Operands,
    *,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Update the moments of LAMB ("Large Batch Optimization for Deep Learning", You et al., 2019).

    Returns:
        A tensor (parameters, 2) in fp32 (fp64 for such parameters): each parameter's sum of squares, and that of the
        direction in which it will go. Where a parameter is spread over ranks, their sum over the ranks goes into the
        trust ratio.
    """
    bias1, root_bias2 = corrections(step, beta1, beta2)
    sums = []
    for param, grad, first, second, _ in _rows(operands):
        with _wide(_width(param), first, second) as (m, v):
            p = param.to(_width(param))
            g, m, v = grad.to(p.dtype).view_as(p) * scale, m.view_as(p), v.view_as(p)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            direction = _lamb_direction(p, m, v, bias1, root_bias2, eps, weight_decay)
            sums.append(torch.stack([p.double().square().sum(), direction.double().square().sum()]))
    if not sums:
        return torch.zeros(0, 2)
    return torch.stack(sums).to(_width(operands.params[0]))


@torch.no_grad()
def lamb_apply(
    operands: Operands,
    *,
    rates: torch.Tensor,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Move parameters in the direction whose moments ``lamb_moments`` has updated; ``grads`` are not read.

    Args:
        operands: params, firsts and seconds, and maybe outs.
        rates: each parameter's learning rate times its trust ratio (fp32, one a parameter).
        step: the one that ``lamb_moments`` got, as everything that follows.
        beta1: how much of the first moment stays.
        beta2: how much of the second moment stays.
        eps: added to the root of the second moment.
        weight_decay: how much of the parameters is part of the direction.
    """
    bias1, root_bias2 = corrections(step, beta1, beta2)
    for rate, (param, _, first, second, out) in zip(rates, _rows(operands), strict=True):
        with _wide(_width(param), param) as (p,):
            m, v = first.to(p.dtype).view_as(p), second.to(p.dtype).view_as(p)
            p.sub_(_lamb_direction(p, m, v, bias1, root_bias2, eps, weight_decay).mul_(rate))
            _publish(out, p)
