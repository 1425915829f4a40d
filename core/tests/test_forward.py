"""A detour at a module's forward leaves the module what it is."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from powertrain.forward import detour


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.factor = 3.0

    def forward(self, x: torch.Tensor, *, shift: float = 0.0) -> torch.Tensor:
        return self.inner(x) * self.factor + shift


def doubled(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return 2 * forward(*args, **kwargs)


def tripled(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return 3 * forward(*args, **kwargs)


ONE = torch.ones(1, 2)


def test_the_module_stays_what_it_is() -> None:
    """Names, class, printed form and signature are the module's; its hooks stay around."""
    module = Scale()
    plain, shown = module(ONE, shift=1.0), repr(module)
    module.register_forward_hook(lambda module, args, output: output + 1)
    detour(module, doubled)
    assert torch.equal(module(ONE, shift=1.0), 2 * plain + 1)
    assert repr(module) == shown
    assert list(module.state_dict()) == ["inner.weight", "inner.bias"]
    assert list(inspect.signature(module.forward).parameters) == ["x", "shift"]
    assert type(module) is Scale


def test_copies_run_themselves() -> None:
    """A deep copy and a pickled one take the detour to their own forward."""
    module = Scale()
    detour(module, doubled)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        before = module(ONE)
        copied.factor = 6.0
        assert torch.equal(copied(ONE), 2 * before)
        assert torch.equal(module(ONE), before)


def test_taken_away_in_any_order() -> None:
    """Detours are undone one by one, the first one placed too; at the end nothing is left."""
    for backwards in (False, True):
        module = Scale()
        plain = module(ONE)
        undo = [detour(module, doubled), detour(module, tripled)]
        assert torch.equal(module(ONE), 6 * plain)
        if backwards:
            undo.reverse()
        undo[0]()
        assert torch.equal(module(ONE), plain * (2 if backwards else 3))
        undo[1]()
        undo[1]()
        assert torch.equal(module(ONE), plain)
        assert "forward" not in vars(module)


def test_a_forward_that_somebody_else_has_placed() -> None:
    """What was the module's forward before is so again."""
    module = Scale()
    own = module.forward
    module.forward = lambda x: own(x) + 10
    plain = module(ONE)
    undo = detour(module, doubled)
    assert torch.equal(module(ONE), 2 * plain)
    undo()
    assert torch.equal(module(ONE), plain)
    assert "forward" in vars(module)
