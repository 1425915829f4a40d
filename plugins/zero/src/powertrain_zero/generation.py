"""``model.generate`` under sharded parameters, on ranks that stop at different lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from powertrain_zero.flow import Flow


def serve_generation(model: torch.nn.Module, flow: Flow) -> Callable[[], None] | None:
    """Let a model's own ``generate`` run different numbers of steps on different ranks.

    Each step gathers the units, which needs all ranks: one that has finished takes
    part until all have.

    Args:
        model: a module with a method ``generate``, or without.
        flow: gathers its units.

    Returns:
        What undoes it; None where there is nothing to do.
    """
    generate = getattr(model, "generate", None)
    if not callable(generate):
        return None

    @functools.wraps(generate)
    def together(*args: Any, **kwargs: Any) -> Any:
        with flow.uneven():
            return generate(*args, **kwargs)

    model.__dict__["generate"] = together

    def undo() -> None:
        model.__dict__.pop("generate", None)

    return undo
