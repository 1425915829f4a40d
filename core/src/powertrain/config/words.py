"""Types and values in a person's words, for messages and the reference."""

from __future__ import annotations

import datetime
import json
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import attrs

_SINGULAR = {bool: "true or false", int: "an integer", float: "a number", str: "a string", pathlib.Path: "a path"}
_PLURAL = {bool: "booleans", int: "integers", float: "numbers", str: "strings", pathlib.Path: "paths"}
_LONGEST = 60


def is_union(kind: Any) -> bool:
    """Say whether a type is ``X | Y``, in either spelling."""
    return get_origin(kind) in (Union, types.UnionType)


def is_literal(kind: Any) -> bool:
    """Say whether a type lists its values."""
    return get_origin(kind) is Literal


def is_list(kind: Any) -> bool:
    """Say whether a type is a list or a sequence, with or without a type of items."""
    return (get_origin(kind) or kind) in (list, Sequence)


def is_dict(kind: Any) -> bool:
    """Say whether a type is a dict or a mapping, with or without types of keys and values."""
    return (get_origin(kind) or kind) in (dict, Mapping)


def is_tuple(kind: Any) -> bool:
    """Say whether a type is a tuple."""
    return (get_origin(kind) or kind) is tuple


def of_type(kind: Any) -> str:
    """Describe a type: "an integer", "a list of strings", '"fp32" or "bf16"'."""
    if kind in _SINGULAR:
        return _SINGULAR[kind]
    if is_literal(kind):
        return either([of_value(choice) for choice in get_args(kind)])
    if is_union(kind):
        return either([of_type(part) for part in get_args(kind) if part is not type(None)])
    if is_list(kind):
        return "a list" + _of_items(get_args(kind)[:1])
    if is_tuple(kind):
        parts = get_args(kind)
        if not parts or parts[-1] is Ellipsis:
            return "a list" + _of_items(parts[:1])
        return f"a list of {len(parts)} " + (_plural(parts[0]) if len(set(parts)) == 1 else "values")
    if is_dict(kind) or attrs.has(kind):
        return "a table"
    return getattr(kind, "__name__", str(kind))


def either(choices: Sequence[str]) -> str:
    """Join alternatives: "a, b or c"."""
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)


def of_value(value: Any) -> str:
    """Write a value as TOML would, shortened."""
    if isinstance(value, (bool, str)):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, (datetime.date, datetime.time)):
        text = value.isoformat()
    else:
        text = "{…}" if isinstance(value, dict) and value else repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def found(value: Any) -> str:
    """Write a value together with what it is: '"8" (a string)'."""
    for kind, name in (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number"),
        (str, "a string"),
        (list, "a list"),
        (dict, "a table"),
        ((datetime.date, datetime.time), "a date or time"),
    ):
        if isinstance(value, kind):
            return f"{_shown(value)} ({name})"
    return f"{_shown(value)} ({type(value).__name__})"


def _shown(value: Any) -> str:
    try:
        return of_value(value)
    except ValueError:  # an integer of more digits than Python prints
        return "…"


def _of_items(kinds: Sequence[Any]) -> str:
    return f" of {_plural(kinds[0])}" if kinds and kinds[0] is not Any else ""


def _plural(kind: Any) -> str:
    if kind in _PLURAL:
        return _PLURAL[kind]
    return "tables" if attrs.has(kind) or is_dict(kind) else f"values, each {of_type(kind)}"
