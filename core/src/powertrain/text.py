"""Small helpers for messages to people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice that ``name`` was most likely meant to be, or None."""
    from difflib import get_close_matches

    found = get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, choices: Iterable[str], before: str = "; did you mean ") -> str:
    """Return ``; did you mean 'x'?`` when something near exists, else an empty string."""
    match = nearest(name, choices)
    return f"{before}{match!r}?" if match else ""


def some(names: Sequence[str], most: int = 12) -> str:
    """Return the names in a row; when there are more than ``most``, the first ones and how many there are."""
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
