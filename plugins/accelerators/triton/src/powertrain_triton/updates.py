"""Optimizer updates over lists of tensors; see ``powertrain.kernels.updates`` for what each argument means."""

from __future__ import annotations

from typing import Any

import torch

from powertrain.kernels.updates import Operands, corrections
from powertrain_triton.device import lamb, sums, updates
from powertrain_triton.table import BLOCK, Table, Tables, format_of, number, ready


def _formats(operands: Operands) -> dict[str, Any]:
    if operands.seconds and format_of(operands.seconds) != format_of(operands.firsts):
        raise ValueError("first and second moments are of two types")
    return {
        "PARAMS": format_of(operands.params),
        "GRADS": format_of(operands.grads),
        "STATE": format_of(operands.firsts),
        "OUTS": format_of(operands.outs),
        "BLOCK": BLOCK,
    }


def _launch(kernel: Any, table: Table, *arguments: Any, **constants: Any) -> None:
    if table.programs:
        with ready(table.device):
            kernel[(table.programs,)](table.rows, table.blocks, *arguments, **constants)


class Kernels:
    """The updates.

    Args:
        tables: that other kernels may share.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def adam(
        self,
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
        """Update by Adam (Kingma and Ba, 2014) or AdamW (Loshchilov, 2017)."""
        if not operands.params:
            return
        bias1, root_bias2 = corrections(step, beta1, beta2)
        table = self._lists(operands)
        decay = (1 - lr * weight_decay) if decoupled else weight_decay
        kind = ("decoupled" if decoupled else "gradient") if weight_decay else "none"
        numbers = (beta1, 1 - beta1, beta2, 1 - beta2, eps, decay, lr / bias1, root_bias2)
        _launch(updates.adam, table, number(scale, table.device), *numbers, DECAY=kind, **_formats(operands))

    def lion(
        self,
        operands: Operands,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        scale: float | torch.Tensor = 1.0,
    ) -> None:
        """Update by Lion (Chen et al., 2023)."""
        if not operands.params:
            return
        table = self._lists(operands)
        numbers = (lr, beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay)
        decays = bool(weight_decay)
        _launch(updates.lion, table, number(scale, table.device), *numbers, DECAY=decays, **_formats(operands))

    def adagrad(
        self,
        operands: Operands,
        *,
        step: int,
        lr: float,
        lr_decay: float,
        eps: float,
        weight_decay: float,
        scale: float | torch.Tensor = 1.0,
    ) -> None:
        """Update by Adagrad (Duchi, Hazan and Singer, 2011)."""
        if not operands.params:
            return
        table = self._lists(operands)
        numbers = (lr / (1 + (step - 1) * lr_decay), eps, weight_decay)
        decays = bool(weight_decay)
        _launch(updates.adagrad, table, number(scale, table.device), *numbers, DECAY=decays, **_formats(operands))

    def momentum(
        self,
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
        """Update by stochastic gradient descent, with momentum where there are ``firsts``."""
        if not operands.params:
            return
        table = self._lists(operands)
        constants = {"DECAY": bool(weight_decay), "NESTEROV": bool(nesterov), "FRESH": bool(first_time)}
        numbers = (lr, momentum, 1 - dampening, weight_decay)
        _launch(updates.momentum, table, number(scale, table.device), *numbers, **constants, **_formats(operands))

    def lamb_moments(
        self,
        operands: Operands,
        *,
        step: int,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        scale: float | torch.Tensor = 1.0,
    ) -> torch.Tensor:
        """Update the moments of LAMB (You et al., 2019).

        Returns:
            A tensor (parameters, 2) in fp32: each parameter's sum of squares, and that of its direction.
        """
        if not operands.params:
            return torch.zeros(0, 2, dtype=torch.float32)
        bias1, root_bias2 = corrections(step, beta1, beta2)
        table = self._lists(operands)
        formats = _formats(operands)
        del formats["OUTS"]
        numbers = (beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, bias1, root_bias2)
        partial = torch.empty(table.programs, 2, dtype=torch.float64, device=table.device)
        _launch(lamb.moments, table, partial, number(scale, table.device), *numbers, **formats)
        return gathered(table, partial, 2)

    def lamb_apply(
        self,
        operands: Operands,
        *,
        rates: torch.Tensor,
        step: int,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        """Move parameters in the direction whose moments ``lamb_moments`` has updated."""
        if not operands.params:
            return
        bias1, root_bias2 = corrections(step, beta1, beta2)
        table = self._lists(operands, grads=False)
        formats = _formats(operands)
        del formats["GRADS"]
        factors = rates.to(table.device, torch.float32, non_blocking=True).contiguous()
        _launch(lamb.apply, table, factors, eps, weight_decay, bias1, root_bias2, **formats)

    def _lists(self, operands: Operands, *, grads: bool = True) -> Table:
        return self._tables.of(
            [operands.params, operands.grads if grads else (), operands.firsts, operands.seconds, operands.outs]
        )


def gathered(table: Table, partial: torch.Tensor, columns: int) -> torch.Tensor:
    """Return (tensors, columns) in fp32: what programs left in ``partial``, added up for each tensor in fp64."""
    out = torch.empty(table.tensors, columns, dtype=torch.float32, device=table.device)
    with ready(table.device):
        sums.gather[(table.tensors, columns)](partial, table.ends, table.blocks, out, COLUMNS=columns, BLOCK=BLOCK)
    return out
