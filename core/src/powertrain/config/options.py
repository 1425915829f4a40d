"""The options that the open tables ``[optimizer]`` and ``[scheduler]`` take, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powertrain.config.optimizers import OPTIMIZERS
from powertrain.config.schedules import SCHEDULES


def all_options(added: Mapping[str, Mapping[str, type[Any]]]) -> dict[str, dict[str, type[Any]]]:
    """Return kind ("optimizer") to name ("adamw") to the attrs class of its options.

    Args:
        added: what plugins add; it wins over the core's own where both know a name.
    """
    known: dict[str, dict[str, type[Any]]] = {"optimizer": dict(OPTIMIZERS), "scheduler": dict(SCHEDULES)}
    for kind, classes in added.items():
        known.setdefault(kind, {}).update(classes)
    return known
