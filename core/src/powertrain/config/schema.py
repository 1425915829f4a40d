"""What may be written: every section and key with its type, range, default and meaning."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import attrs

from powertrain.config import words
from powertrain.config.constraints import constraints
from powertrain.config.docstrings import class_doc, field_docs
from powertrain.config.document import ENABLED
from powertrain.config.effective import plain
from powertrain.config.options import all_options
from powertrain.config.record import Options, expected, keys, open_field, type_hints
from powertrain.config.tables import CORE_TABLES

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_DENIALS = ("no_", "disable_", "skip_")
_SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string", pathlib.Path: "string"}
_SIZES = {"minItems": "minLength", "maxItems": "maxLength"}


@attrs.frozen(kw_only=True)
class Key:
    """One legal key.

    Attributes:
        section: the section it belongs to.
        name: the key.
        choice: for an option of an open table, the ``name`` that takes it; else empty.
        takes: what its value may be, in words.
        default: what holds when it is absent; None also when nothing does.
        required: whether it must be there.
        doc: its meaning.
    """

    section: str
    name: str
    choice: str
    takes: str
    default: Any
    required: bool
    doc: str


def legal_keys(schemas: Mapping[str, type[Any]], options: Options | None = None) -> Iterator[Key]:
    """Yield every key of the core's tables and of the given plugins', options of open tables included.

    Args:
        schemas: section to attrs class, beyond the core's.
        options: what plugins add to the open tables.
    """
    known = all_options(options or {})
    for section, kind in {**CORE_TABLES, **schemas, **CORE_TABLES}.items():
        yield from _keys_of(section, "", kind)
        rest = open_field(kind)
        for choice, options_class in known.get(rest.metadata["open"], {}).items() if rest else ():
            yield from _keys_of(section, choice, options_class)


def _keys_of(section: str, choice: str, kind: type[Any]) -> Iterator[Key]:
    hints, docs = type_hints(kind), field_docs(kind)
    for name, field in keys(kind).items():
        yield Key(
            section=section,
            name=name,
            choice=choice,
            takes=expected(field, hints[name]),
            default=default_of(field),
            required=field.default is attrs.NOTHING,
            doc=docs.get(name, ""),
        )


def default_of(field: attrs.Attribute[Any]) -> Any:
    """Return a field's default as TOML would hold it; None where there is none."""
    default: Any = field.default
    if default is attrs.NOTHING:
        return None
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return None if default.takes_self else plain(default.factory())
    return plain(default)


def json_schema(schemas: Mapping[str, type[Any]], options: Options | None = None) -> dict[str, Any]:
    """Return one JSON Schema (draft 2020-12) of a whole configuration file."""
    known = all_options(options or {})
    sections = {**CORE_TABLES, **schemas, **CORE_TABLES}
    return {
        "$schema": DIALECT,
        "title": "Powertrain configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": {section: section_schema(kind, known) for section, kind in sections.items()},
    }


def section_schema(kind: type[Any], options: Options) -> dict[str, Any]:
    """Return the JSON Schema of one section; what an open table takes depends on its ``name``."""
    schema = _object(kind)
    schema["properties"][ENABLED] = {
        "type": "boolean",
        "default": True,
        "description": "false: the section counts as absent.",
    }
    rest = open_field(kind)
    if rest is None:
        return schema
    default = keys(kind)["name"].default
    schema["additionalProperties"] = True
    schema["allOf"] = []
    for name, options_class in options.get(rest.metadata["open"], {}).items():
        chosen: dict[str, Any] = {"properties": {"name": {"const": name}}}
        if name != default:
            chosen["required"] = ["name"]
        part = _object(options_class)
        part["properties"] = {**dict.fromkeys(schema["properties"], True), **part["properties"]}
        schema["allOf"].append({"if": chosen, "then": part})
    return schema


def _object(kind: type[Any]) -> dict[str, Any]:
    hints, docs = type_hints(kind), field_docs(kind)
    schema: dict[str, Any] = {
        "type": "object",
        "description": class_doc(kind),
        "additionalProperties": False,
        "properties": {name: _property(field, hints[name], docs.get(name)) for name, field in keys(kind).items()},
    }
    if required := [name for name, field in keys(kind).items() if field.default is attrs.NOTHING]:
        schema["required"] = required
    return schema


def _property(field: attrs.Attribute[Any], hint: Any, doc: str | None) -> dict[str, Any]:
    schema = _type(hint)
    for constraint in constraints(field.validator):
        for keyword, value in constraint.keywords.items():
            target = schema.get("items", schema) if keyword == "items" else schema
            if keyword == "items":
                target.update(value)
            else:
                target[_SIZES.get(keyword, keyword) if schema.get("type") == "string" else keyword] = value
    if doc:
        schema["description"] = doc
    if (default := default_of(field)) is not None:
        schema["default"] = default
    return schema


def _type(kind: Any) -> dict[str, Any]:
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if words.is_literal(kind):
        return {"enum": list(get_args(kind))}
    if words.is_union(kind):
        parts = [_type(part) for part in get_args(kind) if part is not types.NoneType]
        return parts[0] if len(parts) == 1 else {"anyOf": parts}
    if words.is_list(kind):
        return {"type": "array", "items": _type(next(iter(get_args(kind)), Any))}
    if words.is_tuple(kind):
        arguments = get_args(kind) or (Any, Ellipsis)
        size = {} if Ellipsis in arguments else {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", "items": _type(arguments[0])} | size
    if words.is_dict(kind):
        return {"type": "object", "additionalProperties": _type((*get_args(kind), Any)[1])}
    return _object(kind) if attrs.has(kind) else {}


def lint(kind: type[Any]) -> list[str]:
    """Return what is wrong with a table's own definition.

    A key says what is on, never what is off; each key has a docstring; ``enabled`` belongs to every section.
    """
    docs = field_docs(kind)
    complaints = []
    for name in keys(kind):
        if name.startswith(_DENIALS):
            complaints.append(f"{kind.__name__}.{name}: say what is on, not what is off")
        if name == ENABLED:
            complaints.append(f"{kind.__name__}.{name}: every section has this key already")
        if not docs.get(name):
            complaints.append(f"{kind.__name__}.{name}: no docstring below the field")
    return complaints
