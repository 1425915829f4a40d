"""The effective configuration: every value, where it comes from, and how it is written down."""

from __future__ import annotations

import datetime
import json
import pickle
from typing import Any

import attrs
import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from powertrain.config import Config, derive, derived, read, structure
from powertrain.config.toml import value as toml_value
from powertrain.config.toml import write
from powertrain.errors import ConfigError


@attrs.frozen(kw_only=True)
class Inner:
    size: int = 3


@attrs.frozen(kw_only=True)
class Zero:
    stage: int = 2
    inner: Inner = attrs.field(factory=Inner)
    tiers: list[Inner] = attrs.field(factory=list)


def build(raw: dict[str, Any], *overrides: str) -> Config:
    return structure(read(raw, overrides=overrides, environ={}), {"zero": Zero} if "zero" in raw else {})


def test_an_empty_configuration_is_complete() -> None:
    """Every key of every core table has a value and the origin "default"."""
    config = build({})
    assert config.optimizer.options["betas"] == (0.9, 0.999)
    assert {str(origin) for _, _, origin in config.values()} == {"default"}
    assert ("optimizer.lr", 1e-3) in [(path, value) for path, value, _ in config.values()]


def test_every_value_has_an_origin() -> None:
    """Values below tables and options of open tables have an origin of their own."""
    config = build({"zero": {"inner": {"size": 4}}, "optimizer": {"lr": 1}}, "zero.stage=3", "plugins.pin.a=b")
    found = {path: str(origin) for path, _, origin in config.values() if str(origin) != "default"}
    assert found == {
        "zero.inner.size": "config argument",
        "optimizer.lr": "config argument",
        "zero.stage": "--set zero.stage",
        "plugins.pin.a": "--set plugins.pin.a",
    }
    assert set(config.origins) == {path for path, _, _ in config.values()}


def test_an_integer_stands_for_a_number() -> None:
    """A number written as an integer becomes a float; a list of two becomes a tuple."""
    config = build({"optimizer": {"lr": 1, "betas": [0, 0.5]}})
    assert repr(config.optimizer.options["lr"]) == "1.0"
    assert repr(config.optimizer.options["betas"]) == "(0.0, 0.5)"


def test_derived_values_are_recorded_in_a_copy() -> None:
    """with_derived changes keys of tables, options and plugin tables, and leaves the original as it was."""
    config = build({"zero": {}})
    changed = (
        config.with_derived("batch.total", 8, derived("2 ranks"))
        .with_derived("optimizer.lr", 0.5, derived("x"))
        .with_derived("zero.stage", 1, derived("y"))
    )
    assert (changed.batch.total, changed.optimizer.options["lr"], changed.tables["zero"].stage) == (8, 0.5, 1)
    assert str(changed.origins["batch.total"]) == "derived from 2 ranks"
    assert (config.batch.total, config.tables["zero"].stage) == (None, 2)


def test_derive_fills_in_what_arithmetic_tells() -> None:
    """Batch sizes, formats and the checkpoint directory are written down with what they come from."""
    config = derive(build({"run": {"output": "out"}, "precision": {"compute": "fp16"}, "batch": {"total": 8}}), 2)
    assert config.batch.micro == 4
    assert config.precision.loss_scale == "dynamic"
    assert config.precision.master == "fp32"
    assert config.checkpoint.directory == "out/checkpoints"
    assert str(config.origins["checkpoint.directory"]) == "derived from run.output"
    assert str(config.origins["precision.loss_scale"]) == "derived from precision.compute"
    with pytest.raises(ConfigError, match="3 ranks = 3 does not divide total = 8"):
        derive(build({"batch": {"total": 8}}), 3)


def test_it_reads_back_from_its_own_toml() -> None:
    """The TOML of a configuration is a configuration with the same values."""
    config = derive(build({"zero": {"tiers": [{"size": 1}, {}]}, "scheduler": {"name": "cosine", "steps": 9}}), 4)
    raw = tomli.loads(config.to_toml())
    assert build(raw).effective() == config.effective()


def test_it_is_plain_json() -> None:
    """effective() holds nothing that JSON cannot."""
    effective = build({"zero": {}}).effective()
    assert json.loads(json.dumps(effective)) == effective
    assert list(effective)[-1] == "zero"


def test_it_survives_pickling() -> None:
    """A configuration can be sent to another process."""
    config = build({"zero": {"stage": 1}})
    assert pickle.loads(pickle.dumps(config)) == config


def test_it_cannot_be_changed() -> None:
    """Neither attributes nor tables nor origins can be assigned."""
    config = build({})
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        config.batch = None  # type: ignore[misc, assignment]
    with pytest.raises(TypeError):
        config.tables["x"] = 1  # type: ignore[index]


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, st.dictionaries(st.text('ab c."\\]='), VALUES, max_size=3), max_size=3))
def test_written_toml_reads_back(sections: dict[str, dict[str, Any]]) -> None:
    """Whatever nest of plain values is written, tomli reads the same."""
    assert tomli.loads(write(sections)) == sections


def test_values_that_toml_cannot_hold_are_refused() -> None:
    """Dates are written, absent values left out, and anything else is a TypeError."""
    assert toml_value(datetime.date(1979, 5, 27)) == "1979-05-27"
    assert write({"a": {"b": None}}) == "[a]\n"
    with pytest.raises(TypeError, match="TOML cannot hold"):
        toml_value(object())
