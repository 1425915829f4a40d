"""Writes plain dicts as TOML."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from powertrain.config.origin import key, quoted


def write(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Write sections of keys; values of None are left out, as TOML has no word for them."""
    return "\n".join(f"[{key(section)}]\n{_pairs(table)}" for section, table in sections.items())


def value(item: Any) -> str:
    """Write one value on one line.

    Raises:
        TypeError: TOML cannot hold it.
    """
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int):
        return str(item)
    if isinstance(item, float):
        return repr(item)
    if isinstance(item, str):
        return quoted(item)
    if isinstance(item, (datetime.date, datetime.time)):
        return item.isoformat()
    if isinstance(item, (list, tuple)):
        return "[" + ", ".join(value(part) for part in item) + "]"
    if isinstance(item, Mapping):
        pairs = ", ".join(f"{key(name)} = {value(part)}" for name, part in item.items() if part is not None)
        return f"{{ {pairs} }}" if pairs else "{}"
    raise TypeError(f"TOML cannot hold {item!r}")


def _pairs(table: Mapping[str, Any]) -> str:
    return "".join(f"{key(name)} = {value(item)}\n" for name, item in table.items() if item is not None)
