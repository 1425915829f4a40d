"""``model.generate`` under sharded parameters, on ranks that stop at different lengths."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, cast

import torch

from powertrain_zero.flow import Flow


def serve_generation(model: torch.nn.Module, flow: Flow) -> Callable[[], None] | None:
    """Let a model's own ``generate`` run different numbers of steps on different ranks.

    Each step gathers the units, which needs all ranks: one that has finished takes
    part until all have. A model within a wrapper is served as well.

    Args:
        model: a module with a method ``generate``, or without.
        flow: gathers its units.

    Returns:
        What undoes it; None where there is nothing to do.
    """
    able = [module for module in model.modules() if callable(getattr(module, "generate", None))]
    if not able:
        return None
    for module in able:
        module.__dict__["generate"] = Together(module, flow)

    def undo() -> None:
        for module in able:
            together = module.__dict__.pop("generate", None)
            if isinstance(together, Together) and together.shadowed is not None:
                module.__dict__["generate"] = together.shadowed

    return undo


class Together:
    """A module's ``generate`` that runs on all ranks until the last is through.

    Args:
        module: whose method it is.
        flow: gathers its units.

    Attributes:
        shadowed: what stood in its place on the module itself, and not on the class.
    """

    def __init__(self, module: torch.nn.Module, flow: Flow) -> None:
        self.shadowed = module.__dict__.get("generate")
        self._module = module
        self._flow = flow
        self._generate = cast("Callable[..., Any]", module.generate)
        functools.update_wrapper(self, self._generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; every rank must call it."""
        with self._flow.uneven():
            return self._generate(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copied model generates by itself.
        copied = memo.get(id(self._module))
        return None if copied is None else types.MethodType(type(copied).generate, copied)
