"""Another way to run a module, which leaves the module what it is: its class, its names, its hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import Any

import torch

Run = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""Runs a module: given its own ``forward`` and the arguments, returns what it returns."""


class Detour:
    """Stands at a module's ``forward``: calls ``run`` in its place.

    It is the module's attribute, not a module around it, so that nothing below gets another name, and hooks of
    the module stay around it. A copy of the module has a copy, which runs the copy.

    Args:
        module: whose forward.
        run: runs it.
    """

    def __init__(self, module: torch.nn.Module, run: Run) -> None:
        self.inner = module.forward
        self.covers = "forward" in vars(module)  # an attribute of the module, not only its class's method
        self.run: Run | None = run
        update_wrapper(self, self.inner, updated=())  # for those who ask forward for its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if self.run is None:
            return self.inner(*args, **kwargs)
        return self.run(self.inner, args, kwargs)


def detour(module: torch.nn.Module, run: Run) -> Callable[[], None]:
    """Let ``run`` run a module from now on.

    Args:
        module: any one that is called.
        run: is given the forward that was there.

    Returns:
        What takes the detour away again; a second call of it does nothing.
    """
    placed = Detour(module, run)
    module.forward = placed

    def undo() -> None:
        placed.run = None
        # What stands before another one stays, and does nothing, until that is taken away.
        while isinstance(first := vars(module).get("forward"), Detour) and first.run is None:
            if first.covers:
                module.forward = first.inner
            else:
                del module.forward

    return undo
