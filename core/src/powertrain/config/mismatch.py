"""What does not fit while a value is structured, gathered rather than raised one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import attrs

from powertrain.config import words
from powertrain.config.origin import Path
from powertrain.config.suggest import nearest


@attrs.frozen(kw_only=True)
class Mismatch:
    """A value that does not fit its type, or a key that does not exist.

    Attributes:
        path: where, relative to the value that was being structured.
        message: what kind of mismatch it is.
        expected: what would have fitted.
        found: what was there.
        suggestion: what the value was probably meant to be.
        keys: what an unknown key was probably meant to be.
    """

    path: Path = ()
    message: str
    expected: str | None = None
    found: str | None = None
    suggestion: str | None = None
    keys: tuple[str, ...] = ()


class Mismatches(Exception):
    """All mismatches of one value."""

    def __init__(self, items: Sequence[Mismatch]) -> None:
        super().__init__(items)
        self.items = items


def attempt(structure: Callable[[Any, Any], Any], value: Any, kind: Any) -> tuple[Any, Sequence[Mismatch]]:
    """Structure a value; return it and no mismatch, or None and what does not fit."""
    try:
        return structure(value, kind), ()
    except Mismatches as mismatches:
        return None, mismatches.items


class Collector:
    """Gathers mismatches, so that one does not hide another."""

    def __init__(self) -> None:
        self.items: list[Mismatch] = []

    def structure(self, part: str | int, structure: Callable[[Any, Any], Any], value: Any, kind: Any) -> Any:
        """Return the structured value, or None with its mismatches gathered below ``part``."""
        made, items = attempt(structure, value, kind)
        self.items += [attrs.evolve(item, path=(part, *item.path)) for item in items]
        return made

    def finish(self) -> None:
        """Raise what was gathered, if anything was."""
        if self.items:
            raise Mismatches(self.items)


def not_a_choice(value: Any, choices: Sequence[Any], others: Sequence[str] = ()) -> Mismatch:
    """Return the mismatch of a value that is none of the choices.

    Args:
        value: what was there.
        choices: the legal values.
        others: further possibilities, in words.
    """
    near = nearest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else []
    return Mismatch(
        message="not one of the choices",
        expected=words.either([*map(words.of_value, choices), *others]),
        found=words.of_value(value) if isinstance(value, str) else words.found(value),
        suggestion=words.either([words.of_value(word) for word in near]) if near else None,
    )


def wrong_type(value: Any, kind: Any) -> Mismatch:
    """Return the mismatch of a value that is not of its type."""
    return Mismatch(
        message="wrong type",
        expected=words.of_type(kind),
        found=words.found(value),
        suggestion=without_quotes(value, kind),
    )


def without_quotes(value: Any, kind: Any) -> str | None:
    """Return the text of a string that holds what was wanted without its quotes."""
    kinds = get_args(kind) if words.is_union(kind) else (kind,)
    if not isinstance(value, str):
        return None
    if bool in kinds and value in ("true", "false"):
        return value
    for number in (int, float):
        if number in kinds or (number is int and float in kinds):
            try:
                return value.strip() if math.isfinite(number(value)) else None
            except (ValueError, OverflowError):
                continue
    return None
