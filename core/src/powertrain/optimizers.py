"""Torch's own optimizers, by name or by dotted path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import torch

from powertrain.errors import OptimizerError
from powertrain.roles.optimizer import FlatOptimizer, Granularity, OptimizerFactory
from powertrain.text import did_you_mean

_CLASSES = {
    "adamw": "AdamW",
    "adam": "Adam",
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "nadam": "NAdam",
    "radam": "RAdam",
    "adamax": "Adamax",
}


class TorchFactory:
    """Makes one kind of torch optimizer with fixed options.

    Attributes:
        granularity: all named ones update element by element; of a dotted one
            nothing is known, so it is given whole matrices.
    """

    granularity: Granularity

    def __init__(self, kind: Any, options: Mapping[str, Any], granularity: Granularity) -> None:
        self.kind, self.options, self.granularity = kind, dict(options), granularity

    def __call__(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        """Return the optimizer of ``params``."""
        try:
            optimizer: torch.optim.Optimizer = self.kind(params, **self.options)
        except (TypeError, ValueError) as error:
            raise OptimizerError(
                f"{self.kind.__name__} refuses its options",
                where="[optimizer]",
                expected=f"{self.kind.__name__}{_signature(self.kind)}",
                found=str(error),
                remedy="keep to these options, in `[optimizer]`",
            ) from error
        return optimizer


def torch_factory(name: str, options: Mapping[str, Any]) -> OptimizerFactory | None:
    """Return the factory of one of torch's optimizers, or of any class by its dotted path.

    Raises:
        OptimizerError: a dotted path that leads to no optimizer.
    """
    if name in _CLASSES:
        return TorchFactory(getattr(torch.optim, _CLASSES[name]), options, "element")
    module, _, attribute = name.rpartition(".")
    if not module:
        return None
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        there = _classes_of(module)
        raise OptimizerError(
            f"there is no optimizer {name}",
            where="optimizer.name",
            expected="the dotted path of an optimizer class, or a name of `powertrain config schema optimizer`",
            found=str(error),
            remedy="correct the path" + did_you_mean(name, there),
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise OptimizerError(
            f"{name} is no optimizer",
            where="optimizer.name",
            expected="the dotted path of a torch.optim.Optimizer class",
            found=repr(kind),
        )
    return TorchFactory(kind, options, "matrix")


def check_step(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that computes the loss again while it updates.

    Raises:
        OptimizerError: its ``step`` must be given a closure.
    """
    closure = signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise OptimizerError(
            f"{type(optimizer).__name__} needs a closure that computes the loss again, several times a step",
            where="[optimizer]",
            expected="an optimizer that updates from the gradients that are there",
            remedy="choose another one",
        )


def _classes_of(module: str) -> list[str]:
    """Return the dotted paths of the optimizers in a module, if there is one, and in torch.optim."""
    result = []
    for each in dict.fromkeys((module, "torch.optim")):
        try:
            members = vars(import_module(each))
        except ImportError:
            continue
        kinds = (name for name, kind in members.items() if isinstance(kind, type))
        result += [f"{each}.{name}" for name in kinds if issubclass(members[name], torch.optim.Optimizer)]
    return result


def _signature(kind: type) -> str:
    """Return the options of a class, as its constructor lists them."""
    names = [name for name in signature(kind).parameters if name != "params"]
    return f"({', '.join(names)})"


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Return what ``[optimizer] name`` would be: a short name of torch's or a plugin's, of others the dotted path."""
    if isinstance(optimizer, FlatOptimizer) and optimizer.kind:
        return optimizer.kind
    kind = type(optimizer)
    short = {getattr(torch.optim, attribute): name for name, attribute in _CLASSES.items()}
    return short.get(kind) or f"{kind.__module__}.{kind.__qualname__}"
