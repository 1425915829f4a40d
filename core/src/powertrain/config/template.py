"""Writes a configuration file to start from: every key, commented out, with its meaning and default."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import attrs

from powertrain.config import words
from powertrain.config.constraints import constraints
from powertrain.config.docstrings import class_doc, field_docs
from powertrain.config.options import all_options
from powertrain.config.origin import key
from powertrain.config.record import Options, keys, open_field, type_hints
from powertrain.config.schema import default_of
from powertrain.config.tables import CORE_TABLES
from powertrain.config.toml import value as toml_value

_WIDTH = 96
_HEAD = """\
# A Powertrain configuration. Every key is at its default: remove the `#` before one to set it.
# `powertrain config check FILE` checks this file, `powertrain config show FILE` completes it.
"""


def template(schemas: Mapping[str, type[Any]], options: Options | None = None) -> str:
    """Return a commented file that reads as the defaults.

    Args:
        schemas: section to attrs class of the plugins to switch on, beyond the core's tables.
        options: what plugins add to the open tables.
    """
    known = all_options(options or {})
    sections = {**CORE_TABLES, **{name: kind for name, kind in schemas.items() if name not in CORE_TABLES}}
    return "\n".join([_HEAD, *("\n".join(_section(name, kind, known)) + "\n" for name, kind in sections.items())])


def _section(section: str, kind: type[Any], options: Options) -> Iterator[str]:
    yield from _comment(class_doc(kind).partition("\n")[0])
    yield f"[{key(section)}]"
    yield from _keys(kind)
    rest = open_field(kind)
    if rest is not None:
        chosen: Any = keys(kind)["name"].default
        classes = options[rest.metadata["open"]]
        yield from _comment(f"Names: {', '.join(classes)}. The keys below are those of {chosen}.")
        yield from _keys(classes[chosen])


def _keys(kind: type[Any]) -> Iterator[str]:
    docs, hints = field_docs(kind), type_hints(kind)
    for name, field in keys(kind).items():
        yield from _comment(docs.get(name, ""))
        if field.default is attrs.NOTHING:
            yield f"{key(name)} = {_example(field, hints[name])}"
        else:
            default = default_of(field)
            shown = _example(field, hints[name]) if default is None else toml_value(default)
            yield f"# {key(name)} = {shown}" + ("  # an example; absent by default" if default is None else "")


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="## ", subsequent_indent="## ")


def _example(field: attrs.Attribute[Any], kind: Any) -> str:
    """Return a legal value, for a key that has no default."""
    if words.is_union(kind):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if words.is_literal(kind):
        return toml_value(get_args(kind)[0])
    if kind in (int, float):
        return toml_value(kind(_inside(field)))
    examples: dict[Any, Any] = {bool: True, str: "..."}
    if kind in examples:
        return toml_value(examples[kind])
    return "{}" if words.is_dict(kind) or attrs.has(kind) else "[]"


def _inside(field: attrs.Attribute[Any]) -> float:
    limits = {name: limit for part in constraints(field.validator) for name, limit in part.keywords.items()}
    if "minimum" in limits:
        return float(limits["minimum"])
    if "maximum" in limits:
        return float(min(limits["maximum"], 1))
    return float(limits.get("exclusiveMinimum", 0)) + 1
