"""When gradients travel compressed, and by which method."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from powertrain.errors import OptimizerError
from powertrain.mesh import WORLD
from powertrain.roles.optimizer import FlatOptimizer
from powertrain_comm.config import Compress

if TYPE_CHECKING:
    from powertrain.engine import Engine
    from powertrain.roles.communicator import Communicator
    from powertrain_comm.compress.communicator import CompressedCommunicator

_log = logging.getLogger("powertrain.comm")


METHODS = ("onebit", "int8", "int4", "topk")
"""What an optimizer may wish for, in an order that all ranks share."""


def method_of(table: Compress, engine: Engine) -> str | None:
    """Return the method for the step that begins; None: exact. The same on every rank."""
    if engine.global_step < table.after:
        return None
    if table.method != "optimizer":
        return table.method
    optimizer = engine.optimizer_wrapper.optimizer
    return agreed(optimizer, engine.context.communicator) if isinstance(optimizer, FlatOptimizer) else None


def begin(compressed: CompressedCommunicator, table: Compress, engine: Engine) -> None:
    """Prepare a step: by which method it compresses, and in which units it owes."""
    asked = compressed.method is not None
    if asked and not compressed.compressed and engine.global_step == table.after + 1:
        _log.warning(
            "[comm.compress] has compressed nothing in a whole step: gradients travel in messages of fewer than "
            "least = %d elements, along other dimensions than dimension = %r, or another section compresses them",
            table.least,
            table.dimension,
        )
    compressed.feedback.begin(engine.loss_scale, asked=asked)
    compressed.use(method_of(table, engine))


def agreed(optimizer: FlatOptimizer, communicator: Communicator) -> str | None:
    """Return what all ranks wish: under sharding, each one's optimizer knows its own parameters' steps only.

    A rank whose optimizer has no state yet, as it holds nothing that was updated, goes along with the others.
    """
    wish = optimizer.reducer
    refuses = wish is None and any(optimizer.state.values())
    votes = torch.tensor([float(refuses), 0.0 if wish is None else 1.0 + METHODS.index(wish)])
    votes = votes.to(communicator.device)
    communicator.all_reduce(votes, WORLD, reduction="max", label="who compresses").wait()
    refused, chosen = (int(vote) for vote in votes.tolist())
    return None if refused or not chosen else METHODS[chosen - 1]


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
