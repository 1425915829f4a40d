"""The reference of keys: complete, positive, and true to what is checked."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any, Literal

import attrs
import pytest
from attrs import validators

from powertrain.config import read, structure
from powertrain.config.docstrings import field_docs
from powertrain.config.options import all_options
from powertrain.config.schema import json_schema, legal_keys, lint
from powertrain.config.tables import CORE_TABLES
from powertrain.config.template import template
from powertrain.discovery import installed, load

SHIPPED = [*CORE_TABLES.values(), *(kind for kinds in all_options({}).values() for kind in kinds.values())]


@attrs.frozen(kw_only=True)
class Inner:
    size: int = 1
    """Bytes."""


@attrs.frozen(kw_only=True)
class Zero:
    """Shards."""

    stage: Literal[1, 2, 3] = attrs.field()
    """What is
    sharded."""

    name: str = attrs.field(validator=[validators.min_len(2), validators.matches_re("[a-z.]+")])
    """Text."""

    ratio: float = attrs.field(validator=[validators.gt(0), validators.le(0.5)])
    """A share."""

    inner: Inner = attrs.field(factory=Inner)
    """More."""

    tiers: list[Inner] = attrs.field(factory=list)
    """Many."""

    pair: tuple[int, int] = attrs.field(default=(1, 2), validator=validators.deep_iterable(validators.ge(1)))
    """Two."""

    scratch: pathlib.Path | None = None
    """Where."""


@pytest.mark.parametrize("kind", SHIPPED)
def test_every_shipped_key_is_documented_and_positive(kind: type[Any]) -> None:
    """Each field has a docstring, says what is on, and leaves `enabled` to every section."""
    assert lint(kind) == []


@pytest.mark.parametrize("name", installed())
def test_every_key_of_installed_plugins_is_documented_and_positive(name: str) -> None:
    """The rules of keys hold for plugins, too."""
    assert lint(load(name).Config) == []


def test_lint_finds_what_it_looks_for() -> None:
    """Denials, a clash with `enabled` and missing docstrings are each told."""

    @attrs.frozen(kw_only=True)
    class Bad:
        disable_overlap: bool = False
        """Off."""
        enabled: bool = True
        """On."""
        mute: int = 0

    assert lint(Bad) == [
        "Bad.disable_overlap: say what is on, not what is off",
        "Bad.enabled: every section has this key already",
        "Bad.mute: no docstring below the field",
    ]


def test_docstrings_are_read_from_the_source() -> None:
    """The string below a field is its text, on one line, inherited fields included."""

    @attrs.frozen(kw_only=True)
    class More(Inner):
        count: int = 0
        """How
        many."""

    assert field_docs(More) == {"size": "Bytes.", "count": "How many."}
    assert field_docs(Zero)["stage"] == "What is sharded."


def test_keys_are_described_in_words() -> None:
    """A key of the reference says what it takes, its default, and whether it must be there."""
    key = {key.name: key for key in legal_keys({"zero": Zero}) if key.section == "zero"}
    assert (key["ratio"].takes, key["ratio"].required) == ("a number > 0 and <= 0.5", True)
    assert key["stage"].takes == "1, 2 or 3"
    assert key["tiers"].takes == "a list of tables"
    assert key["pair"].takes == "a list of 2 integers each >= 1"
    assert key["inner"].default == {"size": 1}
    assert {key.choice for key in legal_keys({}) if key.name == "momentum"} == {"sgd", "rmsprop"}


def test_json_schema_carries_types_ranges_defaults_and_texts() -> None:
    """The JSON Schema of a section holds what the attrs class says."""
    schema = json_schema({"zero": Zero})["properties"]["zero"]
    assert schema["description"] == "Shards."
    assert schema["required"] == ["stage", "name", "ratio"]
    assert schema["additionalProperties"] is False
    properties = schema["properties"]
    assert properties["stage"] == {"enum": [1, 2, 3], "description": "What is sharded."}
    assert properties["name"] == {"type": "string", "minLength": 2, "pattern": "[a-z.]+", "description": "Text."}
    assert properties["ratio"] == {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 0.5,
        "description": "A share.",
    }
    assert properties["pair"] == {
        "type": "array",
        "items": {"type": "integer", "minimum": 1},
        "minItems": 2,
        "maxItems": 2,
        "description": "Two.",
        "default": [1, 2],
    }
    assert properties["tiers"]["items"]["properties"]["size"]["default"] == 1
    assert properties["scratch"] == {"type": "string", "description": "Where."}
    assert properties["enabled"]["type"] == "boolean"


def test_json_schema_makes_options_depend_on_the_name() -> None:
    """The keys of an open table are those of the optimizer that its name chooses."""
    schema = json_schema({})["properties"]["optimizer"]
    by_name = {branch["if"]["properties"]["name"]["const"]: branch for branch in schema["allOf"]}
    assert "momentum" in by_name["sgd"]["then"]["properties"]
    assert "momentum" not in by_name["adamw"]["then"]["properties"]
    assert "clip" in by_name["adamw"]["then"]["properties"]
    assert "required" not in by_name["adamw"]["if"], "an absent name means the default"
    json.dumps(schema)


def test_the_template_reads_as_the_defaults(tmp_path: pathlib.Path) -> None:
    """The commented file passes unchanged and equals an empty configuration."""
    path = tmp_path / "train.toml"
    path.write_text(template({}))
    assert structure(read(path, environ={}), {}).effective() == structure(read({}, environ={}), {}).effective()


def test_the_template_s_keys_are_legal_when_uncommented(tmp_path: pathlib.Path) -> None:
    """Every commented line is a legal key with a legal value."""
    path = tmp_path / "train.toml"
    path.write_text(re.sub(r"(?m)^# (\S+ = )", r"\1", template({"inner": Inner})))
    document = read(path, environ={})
    structure(document, {"inner": Inner})
    assert {key.name for key in legal_keys({}) if not key.choice} <= {name for s in document.raw.values() for name in s}
    assert document.raw["inner"] == {"size": 1}


def test_the_template_sets_what_is_required() -> None:
    """A key without a default stands in the file, with a value that its type allows."""

    @attrs.frozen(kw_only=True)
    class Needy:
        count: int = attrs.field(validator=validators.ge(3))
        path: str = attrs.field()
        share: float = attrs.field(validator=validators.gt(0))

    text = template({"needy": Needy})
    assert '[needy]\ncount = 3\npath = "..."\nshare = 1.0\n' in text
