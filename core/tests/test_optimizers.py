"""Torch's optimizers by name and by dotted path."""

from __future__ import annotations

import pytest
import torch

from powertrain.config.optimizers import OPTIMIZERS
from powertrain.errors import OptimizerError
from powertrain.optimizers import check_step, torch_factory


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_configurable_name_is_made(name: str) -> None:
    """Each name of the configuration makes torch's optimizer of that name, with the table's options."""
    factory = torch_factory(name, {"lr": 0.25})
    assert factory is not None
    made = factory(params())
    assert type(made).__name__.lower() == name
    assert made.param_groups[0]["lr"] == 0.25
    assert factory.granularity == "element"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_tables_defaults_are_torchs(name: str) -> None:
    """The defaults in the schema are those of torch's class."""
    import attrs

    factory = torch_factory(name, {})
    assert factory is not None
    defaults = factory(params()).defaults
    table = OPTIMIZERS[name]()
    for field in attrs.fields(type(table)):
        assert getattr(table, field.name) == pytest.approx(defaults[field.name]), field.name


def test_a_dotted_path_is_that_class() -> None:
    """A dotted path makes any optimizer class; nothing is known of it, so it is given whole matrices."""
    factory = torch_factory("torch.optim.Rprop", {"lr": 0.1})
    assert factory is not None
    assert isinstance(factory(params()), torch.optim.Rprop)
    assert factory.granularity == "matrix"


def test_an_unknown_name_is_left_to_plugins() -> None:
    """A bare name that torch does not have makes nothing."""
    assert torch_factory("lion", {}) is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torch.optim.NoSuch", "there is no optimizer torch.optim.NoSuch"),
        ("no_such_module.Adam", "there is no optimizer no_such_module.Adam"),
        ("collections.Counter", "collections.Counter is no optimizer"),
        ("math.pi", "math.pi is no optimizer"),
    ],
)
def test_paths_to_no_optimizer_are_refused(name: str, says: str) -> None:
    """A path that leads nowhere, or to something else, is an OptimizerError that shows what was found."""
    with pytest.raises(OptimizerError, match=says) as caught:
        torch_factory(name, {})
    assert (caught.value.code, caught.value.where) == ("PT430", "optimizer.name")
    assert caught.value.found


@pytest.mark.parametrize("options", [{"learning_rate": 0.1}, {"lr": -1.0}])
def test_options_that_the_class_refuses_are_reported(options: dict[str, object]) -> None:
    """An option the class does not take, or a value it refuses, is an OptimizerError with its own words."""
    factory = torch_factory("torch.optim.Adam", options)
    assert factory is not None
    with pytest.raises(OptimizerError, match="Adam refuses its options") as caught:
        factory(params())
    assert str(*options) in caught.value.found or "learning rate" in caught.value.found


@pytest.mark.parametrize("name", ["torch.optim.Adem", "troch.optim.Adam"])
def test_a_mistyped_path_is_met_with_the_nearest(name: str) -> None:
    """The typo may be in the class or in the module."""
    with pytest.raises(OptimizerError, match=r"did you mean 'torch\.optim\.Adam'"):
        torch_factory(name, {})


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    """LBFGS computes the loss again within a step, which an engine's step cannot; others only may."""
    check_step(torch.optim.Adam(params()))
    with pytest.raises(OptimizerError, match="LBFGS needs a closure"):
        check_step(torch.optim.LBFGS(params()))
