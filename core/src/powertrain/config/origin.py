"""Where a value of the configuration comes from, and how paths into it are written."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Literal

import attrs

Path = tuple[str | int, ...]
"""A place in the configuration: keys, and indices into arrays."""

Kind = Literal["default", "file", "environment", "override", "argument", "derived"]

_BARE = re.compile(r"[A-Za-z0-9_-]+")


@attrs.frozen
class Origin:
    """Who set a value.

    Attributes:
        kind: which layer it comes from.
        text: the place in that layer: ``train.toml:7:1``, a variable's name, ``--set zero.stage``, or what a
            derived value was computed from.
    """

    kind: Kind
    text: str

    def __str__(self) -> str:
        return self.text


DEFAULT = Origin("default", "default")
"""The origin of a value that nobody set."""


def derived(source: str) -> Origin:
    """Return the origin of a value computed from ``source``, a phrase such as ``run.output``."""
    return Origin("derived", f"derived from {source}")


def dotted(path: Sequence[str | int]) -> str:
    """Write a path as a person would: ``zero.tiers[0].path``, odd keys quoted as in TOML."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + key(part)
    return text


def key(name: str) -> str:
    """Write one key, quoted where TOML asks for it."""
    return name if _BARE.fullmatch(name) else quoted(name)


def quoted(text: str) -> str:
    """Write a string as TOML does; JSON's escapes are TOML's, but JSON leaves DEL as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
