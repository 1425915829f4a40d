"""When gradients travel compressed, and by which method."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from powertrain.errors import LaunchError, OptimizerError, ShardingError
from powertrain.mesh import WORLD
from powertrain.roles.optimizer import FlatOptimizer
from powertrain_comm.config import Compress

if TYPE_CHECKING:
    from powertrain.engine import Engine
    from powertrain.roles.communicator import Communicator
    from powertrain_comm.compress.communicator import CompressedCommunicator

_log = logging.getLogger("powertrain.comm")


NOISY = ("adam", "adamw", "adam8bit", "adamw8bit", "lamb")
"""Optimizers that divide by a running mean of squares, in which what one bit or topk leaves out stays as noise."""

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
    silent = asked and not compressed.compressed and engine.global_step == table.after + 1
    if silent and compressed.rank == 0:
        _log.warning(
            "[comm.compress] has compressed nothing in a whole step: gradients travel in messages of fewer than "
            "least = %d elements%s, or another section compresses them",
            table.least,
            f', along other dimensions than dimension = "{table.dimension}"' if table.dimension is not None else "",
        )
    compressed.feedback.begin(engine.loss_scale, asked=asked)
    compressed.use(method_of(table, engine))


def agreed(optimizer: FlatOptimizer, communicator: Communicator) -> str | None:
    """Return what all ranks wish: under sharding, each one's optimizer knows its own parameters' steps only.

    A rank whose optimizer has no state yet, as it holds nothing that was updated, goes along with the others.

    Raises:
        OptimizerError: the optimizer wishes for a method that there is not.
    """
    wish = optimizer.reducer
    if wish is not None and wish not in METHODS:
        raise OptimizerError(
            "an optimizer wishes for a compression that there is not",
            where=f"{type(optimizer).__name__}.reducer",
            expected=f"None, or one of {', '.join(METHODS)}",
            found=repr(wish),
            remedy="let its reducer return one of these",
        )
    refuses = wish is None and any(optimizer.state.values())
    votes = torch.tensor([float(refuses), 0.0 if wish is None else 1.0 + METHODS.index(wish)])
    votes = votes.to(communicator.device)
    communicator.all_reduce(votes, WORLD, reduction="max", label="who compresses").wait()
    refused, chosen = (int(vote) for vote in votes.tolist())
    return None if refused or not chosen else METHODS[chosen - 1]


def check(table: Compress, engine: Engine) -> None:
    """Look at what the table needs of a run, once there is one.

    Raises:
        LaunchError, ShardingError: it has no such dimension.
        OptimizerError: ``method`` is "optimizer", and its class has no ``reducer`` of its own.
    """
    communicator = engine.context.communicator
    if table.method == "none":
        if (
            table != Compress()
            and not engine.context.config.is_stated("comm.compress.method")
            and communicator.rank == 0
        ):
            _log.warning('[comm.compress] has no method, so it compresses nothing: set method = "int8", for example')
        return
    if table.dimension is not None:
        try:
            communicator.size(table.dimension)
        except (LaunchError, ShardingError) as error:
            raise type(error)(
                error.message,
                where="comm.compress.dimension",
                expected=error.expected,
                found=repr(table.dimension),
                remedy="name a dimension of this run, or leave the key out",
            ) from error
    optimizer = engine.optimizer_wrapper.optimizer
    if table.method != "optimizer":
        kind = optimizer.kind if isinstance(optimizer, FlatOptimizer) else type(optimizer).__name__.lower()
        if table.method in ("onebit", "topk") and kind in NOISY and communicator.rank == 0:
            _log.warning(
                '[comm.compress] method = "%s" is noise to the second moment of %s: use SGD, onebit_adam with method = '
                '"optimizer", or "int8"',
                table.method,
                kind,
            )
        return
    if isinstance(optimizer, FlatOptimizer) and type(optimizer).reducer is not FlatOptimizer.reducer:
        return
    raise OptimizerError(
        "this optimizer never asks for compressed gradients",
        where="comm.compress.method",
        expected="an optimizer that does: onebit_adam, zero_one_adam, onebit_lamb",
        found=type(optimizer).__name__,
        remedy='choose one of them, or name a method: [comm.compress] method = "int8"',
    )
