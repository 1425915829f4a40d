"""Sizes as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(text: str) -> int:
    """Return the bytes of ``1GiB``, ``512MB``, ``4096`` or ``1.5g``: "MB" is a million bytes, "M" and "MiB" are 2**20.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size; write 512MiB, 1GiB or a number of bytes")
    unit, rest = (match[2] or "").lower(), (match[3] or "").lower()
    if not unit:
        return int(float(match[1]))
    factor = 1000 ** (_UNITS[unit] // 10) if rest == "b" else 1 << _UNITS[unit]
    return int(float(match[1]) * factor)


def show_size(count: int) -> str:
    """Return bytes in binary units, short: ``1 GiB``, ``64 KiB``, ``1.5 MiB``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"
