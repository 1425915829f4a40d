"""Number formats and the loss scale."""

from __future__ import annotations

import json

import pytest
import torch

from powertrain.config.tables import Precision
from powertrain.errors import PrecisionError
from powertrain.precision import LossScale, Recipe, scale_gradient
from powertrain.testing.null import NullHost


class OnlyFp32(NullHost):
    """A device without low precision."""

    name = "old"

    def dtypes(self) -> frozenset[torch.dtype]:
        return frozenset({torch.float32})


@pytest.mark.parametrize(
    ("table", "formats"),
    [
        ({}, ("fp32", "fp32", "fp32", "fp32")),
        ({"compute": "bf16"}, ("bf16", "bf16", "fp32", "fp32")),
        ({"compute": "bf16", "master": "bf16", "reduce": "bf16"}, ("bf16",) * 4),
        ({"compute": "fp16", "autocast": True}, ("fp16", "fp32", "fp32", "fp32")),
    ],
)
def test_recipes_follow_the_table(table: dict[str, object], formats: tuple[str, ...]) -> None:
    """Compute, parameters, master and reduction formats come from the table; the rest is fp32."""
    recipe = Recipe.build(Precision(**table), NullHost())
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    found = (recipe.compute, recipe.parameters, recipe.master, recipe.reduce)
    assert found == tuple(named[name] for name in formats)


@pytest.mark.parametrize(
    ("table", "casts"),
    [({}, None), ({"compute": "bf16"}, torch.bfloat16), ({"compute": "bf16", "autocast": True}, None)],
)
def test_inputs_are_converted_where_the_model_is(table: dict[str, object], casts: torch.dtype | None) -> None:
    """Inputs take the parameters' format, except in fp32 and under autocast."""
    assert Recipe.build(Precision(**table), NullHost()).cast_inputs == casts


@pytest.mark.parametrize(
    ("table", "where"), [({"compute": "bf16"}, "precision.compute"), ({"master": "fp16"}, "precision.master")]
)
def test_a_format_that_the_device_lacks_is_refused(table: dict[str, object], where: str) -> None:
    """A format the accelerator cannot train in is a PrecisionError that lists those it can."""
    with pytest.raises(PrecisionError, match="accelerator 'old' does not support") as caught:
        Recipe.build(Precision(**table), OnlyFp32())
    assert (caught.value.code, caught.value.where) == ("PT450", where)
    assert caught.value.expected == "one of fp32"


def test_a_recipe_reads_as_a_sentence() -> None:
    """The log shows each part's format."""
    recipe = Recipe.build(Precision(compute="bf16", autocast=True), NullHost())
    parts = [
        "compute bf16",
        "parameters fp32",
        "master fp32",
        "reduce fp32",
        "accumulate fp32",
        "state fp32",
        "autocast",
    ]
    assert str(recipe) == ", ".join(parts)


@pytest.mark.parametrize(
    ("table", "value", "dynamic", "checked"),
    [
        ({}, 1.0, False, False),
        ({"compute": "bf16"}, 1.0, False, False),
        ({"compute": "fp16"}, 65536.0, True, True),
        ({"compute": "fp16", "loss_scale": 128.0}, 128.0, False, True),
        ({"loss_scale": 8.0}, 8.0, False, True),
        ({"loss_scale": "dynamic"}, 65536.0, True, True),
    ],
)
def test_the_scale_suits_the_format(table: dict[str, object], value: float, dynamic: bool, checked: bool) -> None:
    """fp16 scales dynamically unless told otherwise; overflow is looked for where it can happen."""
    scale = LossScale.build(Precision(**table))
    assert (scale.value, scale.dynamic, scale.checked) == (value, dynamic, checked)


def test_an_overflow_halves_and_a_window_doubles() -> None:
    """The scale halves at each overflow, and doubles after a window of steps without one, counted anew."""
    scale = LossScale(1024.0, dynamic=True, checked=True, window=3)
    scale.update(applied=True)
    scale.update(applied=True)
    scale.update(applied=False)
    assert (scale.value, scale.skipped) == (512.0, 1)
    values = []
    for _ in range(6):
        scale.update(applied=True)
        values.append(scale.value)
    assert values == [512, 512, 1024, 1024, 1024, 2048]


def test_the_scale_has_a_ceiling() -> None:
    """The scale grows no further than 2**24."""
    scale = LossScale(2.0**23, dynamic=True, checked=True, window=1)
    for _ in range(3):
        scale.update(applied=True)
    assert scale.value == 2.0**24


def test_overflow_at_the_minimum_ends_the_run() -> None:
    """At a scale of 1 another overflow is a PrecisionError that counts the skipped steps."""
    scale = LossScale(2.0, dynamic=True, checked=True)
    scale.update(applied=False)
    assert scale.value == 1.0
    with pytest.raises(PrecisionError, match="although the loss scale has fallen to 1") as caught:
        scale.update(applied=False)
    assert caught.value.found == "2 steps skipped so far"
    assert "bf16" in caught.value.remedy


def test_a_static_scale_never_moves() -> None:
    """A static scale counts skipped steps and stays as configured."""
    scale = LossScale(128.0, dynamic=False, checked=True, window=1)
    for applied in (False, False, True, True):
        scale.update(applied=applied)
    assert (scale.value, scale.skipped) == (128.0, 2)


def test_the_scale_continues_from_its_state() -> None:
    """Value, skipped steps and the place in the window survive JSON."""
    old = LossScale(1024.0, dynamic=True, checked=True, window=4)
    for applied in (False, True, True, True):
        old.update(applied=applied)
    new = LossScale(65536.0, dynamic=True, checked=True, window=4)
    new.load_state(json.loads(json.dumps(old.state())))
    assert new.state() == old.state()
    new.update(applied=True)
    assert new.value == 1024.0


def test_a_static_scale_keeps_its_configured_value() -> None:
    """Loading into a static scale takes the counts, not the value."""
    scale = LossScale(4.0, dynamic=False, checked=True)
    scale.load_state({"dynamic": True, "value": 512.0, "good_steps": 3, "skipped": 2})
    assert (scale.value, scale.skipped) == (4.0, 2)


def test_a_dynamic_scale_does_not_begin_at_a_static_one() -> None:
    """A run in fp16 that continues one in fp32 begins at its own scale: at 1 the first overflow would end it."""
    scale = LossScale.build(Precision(compute="fp16"))
    scale.load_state(json.loads(json.dumps(LossScale.build(Precision()).state())))
    assert scale.value == 65536.0


def test_scaling_touches_the_gradient_only() -> None:
    """The value passes unchanged, and its gradient is multiplied."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    scaled = scale_gradient(x, 8.0)
    assert torch.equal(scaled, x)
    (scaled * torch.tensor([3.0, 5.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [24.0, 40.0]


def test_what_needs_no_scaling_is_itself() -> None:
    """A factor of 1, or a tensor without gradient, is returned as it is."""
    x = torch.tensor(1.0, requires_grad=True)
    assert scale_gradient(x, 1.0) is x
    y = torch.tensor(1.0)
    assert scale_gradient(y, 2.0) is y
