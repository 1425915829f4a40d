"""The optimizer roles: what updates, and what brings gradients to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs
import torch

if TYPE_CHECKING:
    from powertrain.roles.checkpoint import CheckpointReader, TensorSlice

Granularity = Literal["element", "tensor", "matrix"]
"""What an update rule must see at once: any element alone, a whole tensor's norm, a whole matrix."""


class OptimizerFactory(Protocol):
    """Makes an optimizer over parameters, in the manner of ``torch.optim``.

    Attributes:
        granularity: what its update must see at once; sharders honour it.
    """

    granularity: Granularity

    def __call__(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        """Return the optimizer of ``params`` (tensors or group dictionaries)."""


@attrs.frozen
class Update:
    """What one optimizer step did.

    Attributes:
        applied: False when the gradients overflowed and the step was skipped.
        grad_norm: returns the global norm before clipping, a 0-d tensor. Called on some
            ranks only, so it must not communicate, and before the next ``begin``.
    """

    applied: bool
    grad_norm: Callable[[], torch.Tensor]


class OptimizerWrapper(ABC):
    """Takes gradients from backward to updated parameters.

    It owns where parameters, gradients and optimizer state rest, so it is also
    the one that lists them for checkpoints.

    Attributes:
        optimizer: the torch optimizer that schedulers act on.
    """

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def begin(self, *, last: bool, once: bool = False) -> None:
        """Prepare for the next micro-batch's backward passes.

        Args:
            last: it ends the accumulation, so reductions may start.
            once: it will have one backward pass; otherwise gradients may come after reductions have started.
        """

    def flush(self) -> None:
        """Start the reductions that backward has not started, in an order that all ranks share.

        Called after the last micro-batch, before any other collective.
        """

    @abstractmethod
    def step(self, *, grad_scale: float, clip: float | None, check_overflow: bool) -> Update:
        """Finish reductions, divide gradients by ``grad_scale``, clip, update, publish, clear.

        Args:
            grad_scale: what gradients were multiplied by on the way (loss scale).
            clip: the largest global norm, or None.
            check_overflow: skip the update when a gradient is not finite.
        """

    @abstractmethod
    def discard(self) -> None:
        """Drop the gradients gathered so far."""

    @abstractmethod
    def tensors(self) -> list[TensorSlice]:
        """Return this rank's slices of parameters and optimizer state, by global name."""

    def values(self) -> dict[str, Any]:
        """Return optimizer state that is no tensor, as JSON that is the same on every rank."""
        return {}

    @abstractmethod
    def load(self, reader: CheckpointReader) -> list[str]:
        """Fill parameters and optimizer state from ``reader``, in one read; return the names loaded.

        Nothing is changed when the read fails.

        Raises:
            CheckpointMismatch: names or shapes differ from this model's.
        """

    # --- access to single parameters, which may rest in pieces ---

    @abstractmethod
    def parts(self, param: torch.nn.Parameter) -> dict[str, TensorSlice]:
        """Return what this rank holds of one of the model's parameters, as slices of the global tensor.

        Keys: ``value`` (what the optimizer updates), ``grad`` (the mean gradient of
        the step under way or just done, where there is one) and ``optimizer/<key>``. Writing into a
        slice changes the state; call ``publish`` afterwards. Local: nothing is communicated.
        """

    @abstractmethod
    def publish(self) -> None:
        """Make the model's parameters follow values that were written through ``parts``; every rank calls it."""

    def gathered(self, params: Sequence[torch.nn.Parameter], *, write: bool = False) -> AbstractContextManager[None]:
        """Return a context in which this rank holds ``params`` whole; every rank must enter and leave it.

        Args:
            params: some of the model's parameters.
            write: keep what the block writes into them; the first data rank's values win.
        """
        return nullcontext()

    def close(self) -> None:
        """Take hooks off the model."""
