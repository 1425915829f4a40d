"""Makes the optimizers of ``[optimizer] name``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch

from powertrain.errors import OptimizerError
from powertrain.roles.optimizer import Granularity
from powertrain_optimizers.base import KernelOptimizer

CLASSES = {
    "adam": "adam.Adam",
    "adamw": "adam.AdamW",
    "sgd": "sgd.SGD",
    "adagrad": "adagrad.Adagrad",
    "lion": "lion.Lion",
    "lamb": "lamb.Lamb",
    "adafactor": "adafactor.Adafactor",
    "muon": "muon.Muon",
    "adam8bit": "adam8bit.Adam8bit",
    "adamw8bit": "adam8bit.AdamW8bit",
    "onebit_adam": "onebit_adam.OneBitAdam",
    "zero_one_adam": "zero_one_adam.ZeroOneAdam",
    "onebit_lamb": "onebit_lamb.OneBitLamb",
    "schedule_free_adamw": "schedule_free.ScheduleFreeAdamW",
}
"""Every name, and where its class is."""


class Factory:
    """Makes one kind of optimizer with fixed options.

    Args:
        kind: the class.
        options: its arguments.

    Attributes:
        granularity: what its update must see at once.
        named: it is called with names.
    """

    named = False

    def __init__(self, kind: type[KernelOptimizer], options: Mapping[str, Any]) -> None:
        self.granularity: Granularity = kind.granularity
        self._kind, self._options = kind, dict(options)

    def __call__(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        """Return the optimizer of ``params``.

        Raises:
            OptimizerError: the class refuses its options.
        """
        try:
            made = self._kind(params, **self._options)
        except (TypeError, ValueError) as error:
            raise OptimizerError(
                f"{self._kind.__name__} refuses its options", where="optimizer", found=str(error)
            ) from error
        return made


class MuonFactory(Factory):
    """Makes Muon with two groups: matrices, and what AdamW updates; ``param_groups[1]`` is AdamW's."""

    named = True

    def __init__(self, kind: type[KernelOptimizer], options: Mapping[str, Any]) -> None:
        rest = dict(options)
        self._names = rest.pop("adamw_names", ())
        own = {key: rest.pop(f"adamw_{key}", None) for key in ("lr", "weight_decay")}
        self._own = {key: value for key, value in own.items() if value is not None}
        super().__init__(kind, rest)

    def __call__(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        """Return the optimizer of ``(name, parameter)`` pairs; pairs without names go by their dimensions alone."""
        from powertrain_optimizers.muon import groups_of

        named = [item if isinstance(item, tuple) else ("", item) for item in params]
        return super().__call__(groups_of(named, self._names, **self._own))


def factory(name: str, options: Mapping[str, Any]) -> Factory | None:
    """Return the factory of the optimizer called ``name``, or None if it is not of this package."""
    if name not in CLASSES:
        return None
    module, _, attribute = CLASSES[name].partition(".")
    kind = getattr(import_module(f"powertrain_optimizers.{module}"), attribute)
    return (MuonFactory if name == "muon" else Factory)(kind, options)
