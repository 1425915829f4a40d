"""How the engine calls the model and the loss function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from powertrain import nest
from powertrain.errors import EngineError


class ModelCall:
    """Calls the model with a batch and makes a loss of its output.

    The model is called as ``model(batch)`` for a tensor, ``model(*batch)`` for a
    tuple or list and ``model(**batch)`` for a mapping. ``loss_fn(output, batch)``
    then makes the loss. Where the model's ``forward`` takes one element fewer
    than a tuple has, the last element is the target: ``model(*batch[:-1])`` and
    ``loss_fn(output, batch[-1])``.

    Args:
        model: the module that runs.
        loss_fn: makes the loss; None when the model returns it.
    """

    def __init__(self, model: torch.nn.Module, loss_fn: Callable[..., Any] | None) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self._signature = inspect.signature(model.forward)

    def __call__(self, batch: Any, device: torch.device, floating: torch.dtype | None) -> Any:
        """Return the loss of ``batch``, or the model's output when that is no loss."""
        batch = nest.place(batch, device, None)
        inputs, target = self._divide(batch)
        if floating is not None:
            inputs = nest.place(inputs, device, floating)
        if isinstance(inputs, Mapping):
            output = self.model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            output = self.model(*inputs)
        else:
            output = self.model(inputs)
        if self.loss_fn is not None:
            return self.loss_fn(output, target)
        return loss_in(output)

    def _divide(self, batch: Any) -> tuple[Any, Any]:
        """Return what the model is called with, and what the loss function compares with."""
        if self.loss_fn is None or not isinstance(batch, (tuple, list)) or len(batch) < 2:
            return batch, batch
        if self._takes(len(batch)) or not self._takes(len(batch) - 1):
            return batch, batch
        return batch[:-1], batch[-1]

    def _takes(self, count: int) -> bool:
        try:
            self._signature.bind(*[None] * count)
        except TypeError:
            return False
        return True


def loss_in(output: Any) -> Any:
    """Return the loss that a model's output holds, else the output itself.

    A loss is the output when that is a tensor, its ``loss`` attribute or key, or
    the first of a tuple when that is a scalar.
    """
    if isinstance(output, torch.Tensor):
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        loss = output[0] if output[0].ndim == 0 else None
    return output if loss is None else loss


def checked_loss(loss: Any, has_loss_fn: bool) -> torch.Tensor:
    """Return ``loss`` if it is a scalar tensor.

    Raises:
        EngineError: it is not.
    """
    if isinstance(loss, torch.Tensor) and loss.ndim == 0:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    who = "loss_fn" if has_loss_fn else "the model"
    raise EngineError(
        f"{who} returned no loss",
        expected="a tensor without dimensions",
        found=found,
        remedy="reduce it to a mean" if has_loss_fn else "pass loss_fn=… to powertrain.initialize, or return the loss",
    )
