"""When gradients travel compressed, and by which method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from powertrain.errors import OptimizerError
from powertrain.roles.optimizer import FlatOptimizer
from powertrain_comm.config import Compress

if TYPE_CHECKING:
    from powertrain.engine import Engine


def method_of(table: Compress, engine: Engine) -> str | None:
    """Return the method for the step that begins; None: exact. The same on every rank."""
    if engine.global_step < table.after:
        return None
    if table.method != "optimizer":
        return table.method
    optimizer = engine.optimizer_wrapper.optimizer
    return optimizer.reducer if isinstance(optimizer, FlatOptimizer) else None


def check(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that never asks for compression.

    Raises:
        OptimizerError: its class has no ``reducer`` of its own.
    """
    if isinstance(optimizer, FlatOptimizer) and type(optimizer).reducer is not FlatOptimizer.reducer:
        return
    raise OptimizerError(
        "this optimizer never asks for compressed gradients",
        where="comm.compress.method",
        expected="an optimizer that does: onebit_adam, zero_one_adam, onebit_lamb",
        found=type(optimizer).__name__,
        remedy='choose one of them, or name a method: [comm.compress] method = "int8"',
    )
