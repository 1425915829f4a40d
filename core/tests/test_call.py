"""How models and loss functions are called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from powertrain.call import ModelCall, checked_loss, loss_in
from powertrain.errors import EngineError

CPU = torch.device("cpu")
X, Y = torch.tensor([1.0, 2.0]), torch.tensor([3, 4])


class Recorder(nn.Module):
    """Returns what it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


class One(nn.Module):
    """Takes one input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Two(nn.Module):
    """Takes one or two inputs."""

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return x if y is None else x + y


def called(batch: Any) -> Any:
    output: Any = ModelCall(Recorder(), None)(batch, CPU, None)
    return output


@pytest.mark.parametrize("batch", [(X, Y), [X, Y]])
def test_sequences_are_positional(batch: Any) -> None:
    """``model(*batch)`` for tuples and lists."""
    args, kwargs = called(batch)
    assert [torch.equal(a, b) for a, b in zip(args, (X, Y), strict=True)] == [True, True]
    assert kwargs == {}


def test_mappings_are_keywords() -> None:
    """``model(**batch)`` for mappings."""
    args, kwargs = called({"x": X, "y": Y})
    assert args == ()
    assert list(kwargs) == ["x", "y"]


def test_a_tensor_is_the_argument() -> None:
    """``model(batch)`` for a tensor."""
    args, _ = called(X)
    assert torch.equal(args[0], X)


def test_the_target_is_what_the_model_does_not_take() -> None:
    """A model that takes one element fewer than the tuple has leaves the last to the loss function."""
    assert ModelCall(One(), lambda out, target: (out, target))((X, Y), CPU, None)[1] is not None
    out, target = ModelCall(One(), lambda out, target: (out, target))((X, Y), CPU, None)
    assert torch.equal(out, X * 2)
    assert torch.equal(target, Y)


def test_several_inputs_and_a_target() -> None:
    """``model(*batch[:-1])`` for longer tuples."""
    out, target = ModelCall(Two(), lambda out, target: (out, target))((X, X, Y), CPU, None)
    assert torch.equal(out, X + X)
    assert torch.equal(target, Y)


@pytest.mark.parametrize("batch", [(X, X), {"x": X, "y": X}, X])
def test_a_model_that_takes_all_leaves_the_whole_batch_to_the_loss(batch: Any) -> None:
    """Otherwise ``loss_fn(output, batch)``, with the batch in its own shape."""
    _, seen = ModelCall(Two(), lambda out, target: (out, target))(batch, CPU, None)
    assert type(seen) is type(batch)


def test_only_inputs_are_converted() -> None:
    """In low precision floating-point inputs are converted, targets are not."""
    out, target = ModelCall(One(), lambda out, target: (out, target))((X, X), CPU, torch.bfloat16)
    assert (out.dtype, target.dtype) == (torch.bfloat16, torch.float32)


class Result(dict):
    """A mapping with attributes, as model libraries return."""


@pytest.mark.parametrize(
    "output",
    [
        torch.tensor(1.5),
        {"loss": torch.tensor(1.5), "logits": X},
        Result(loss=torch.tensor(1.5)),
        SimpleNamespace(loss=torch.tensor(1.5), logits=X),
        (torch.tensor(1.5), X),
        [torch.tensor(1.5)],
    ],
)
def test_the_loss_is_found_in_the_output(output: Any) -> None:
    """A scalar, a ``loss`` key or attribute, or a scalar first element is the loss."""
    assert loss_in(output).item() == 1.5


@pytest.mark.parametrize("output", [(X, torch.tensor(1.5)), {"logits": X}, SimpleNamespace(logits=X), ()])
def test_an_output_without_a_loss_stays_itself(output: Any) -> None:
    """What holds no loss is returned as it is."""
    assert loss_in(output) is output


@pytest.mark.parametrize(
    ("loss", "has_loss_fn", "says"),
    [
        (X, True, ["loss_fn returned no loss", "a tensor of shape (2,)", "reduce it to a mean"]),
        (X, False, ["the model returned no loss", "pass loss_fn="]),
        (None, False, ["the model returned no loss", "NoneType"]),
        (1.5, True, ["loss_fn returned no loss", "float"]),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, has_loss_fn: bool, says: list[str]) -> None:
    """Anything but a tensor without dimensions is an EngineError that says who returned what."""
    with pytest.raises(EngineError) as caught:
        checked_loss(loss, has_loss_fn)
    assert caught.value.code == "PT420"
    assert all(text in str(caught.value) for text in says)
