"""Sets keys of one table in the text of a TOML file, and leaves every other character as it is."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from powertrain.config import read
from powertrain.config.positions import positions

Value = str | int


def lines(values: Mapping[str, Value]) -> list[str]:
    """Return one line of TOML a key."""
    return [f"{key} = {json.dumps(value)}" for key, value in values.items()]


def edited(text: str, table: str, values: Mapping[str, Value]) -> str:
    """Return ``text`` with these keys set in ``[table]``, which is appended where there is none.

    Args:
        text: a TOML document.
        table: its name, a bare key.
        values: what to set.

    Raises:
        ValueError: the table is written in a way that this cannot edit.
    """
    import tomli

    end = "\r\n" if "\r\n" in text else "\n"
    plain = text.replace("\r\n", "\n")
    wanted: dict[str, Any] = tomli.loads(plain)
    wanted[table] = {**wanted.get(table, {}), **values}
    found = positions(plain)
    rows = plain.split("\n")
    missing = []
    for key, value in values.items():
        place = found.get((table, key))
        if place is None:
            missing.append(f"{key} = {json.dumps(value)}")
            continue
        line, column = place
        before, rest = rows[line - 1][: column - 1], rows[line - 1][column - 1 :]
        pattern = r"""((?:"[^"]*"|'[^']*'|[\w-]+)\s*=\s*)("(?:\\.|[^"\\])*"|'[^']*'|[^\s,#}]+)"""
        new = re.sub(pattern, lambda match, value=value: match[1] + json.dumps(value), rest, count=1)  # type: ignore[misc]
        rows[line - 1] = before + new
    header = re.compile(rf"""\s*\[\s*(["']?){re.escape(table)}\1\s*\]\s*(#.*)?""")
    place = found.get((table,))
    if missing and place is not None and header.fullmatch(rows[place[0] - 1]):
        rows[place[0] : place[0]] = missing
    elif missing:
        while rows and not rows[-1].strip():
            rows.pop()
        rows += [*([""] if rows else []), f"[{table}]", *missing, ""]
    result = "\n".join(rows)
    try:
        right = tomli.loads(result) == wanted
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"[{table}] is not written as a table with a header of its own")
    return result.replace("\n", end)


def check(path: str) -> None:
    """Raise where ``write`` would.

    Raises:
        ConfigError: there is no such file, or it is no TOML.
        UsageError: it cannot be written.
    """
    read(path, environ={})
    if not os.access(path, os.W_OK):
        raise click.UsageError(f"--write: {path} cannot be written")


def write(path: str, table: str, values: Mapping[str, Value]) -> None:
    """Set keys in a file, all or nothing.

    Raises:
        UsageError: the table cannot be edited; has the lines to paste.
    """
    file = Path(path).resolve()  # what a link points to
    try:
        text = edited(file.read_bytes().decode(), table, values)
    except ValueError as error:
        raise click.UsageError(f"--write: {path}: {error}; set by hand: " + ", ".join(lines(values))) from error
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(text.encode())
        aside.chmod(file.stat().st_mode & 0o777)
        aside.replace(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
