"""The tables of options agree with the torch optimizers they configure."""

from __future__ import annotations

import inspect
import typing

import attrs
import pytest
import torch

from powertrain.config.optimizers import OPTIMIZERS
from powertrain.config.record import keys

CLASSES = {kind.__name__.lower(): kind for kind in vars(torch.optim).values() if inspect.isclass(kind)}
ELSEWHERE = {
    "params": "the model's",
    "differentiable": "gradients of updates are no part of training",
    "decoupled_weight_decay": "of adam: that is adamw",
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_option_is_one_of_torch_s_with_its_default(name: str) -> None:
    """An option has torch's name and default, and no option of torch is forgotten."""
    signature = inspect.signature(CLASSES[name]).parameters
    fields = keys(OPTIMIZERS[name])
    assert {option: field.default for option, field in fields.items()} == {
        option: signature[option].default for option in fields
    }
    assert set(signature) - set(fields) <= set(ELSEWHERE)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_takes_its_defaults(name: str) -> None:
    """torch's class accepts the options as they come out of an empty table."""
    CLASSES[name]([torch.nn.Parameter(torch.zeros(2))], **attrs.asdict(OPTIMIZERS[name]()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_are_declared_as_floats(name: str) -> None:
    """No option whose default is written 0 rejects 0.5."""
    hints = typing.get_type_hints(OPTIMIZERS[name])
    assert int not in hints.values()
