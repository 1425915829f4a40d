"""Reads a configuration from a file or a dict and lays the overrides over it.

Later layers win: the file or dict, then ``POWERTRAIN__SECTION__KEY`` variables,
then ``--set`` strings. What a key may be called and hold is not decided here.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from powertrain.config.origin import DEFAULT, Origin, Path, dotted
from powertrain.config.overrides import Override, from_environment, from_settings
from powertrain.config.problem import Problem, error
from powertrain.config.suggest import nearest
from powertrain.errors import ConfigError

_AT = re.compile(r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$", re.DOTALL)
ENABLED = "enabled"
"""The key that every section may carry: ``enabled = false`` makes the section count as absent."""
DISABLE = ("plugins", "disable")
"""The key to which the environment adds: ``--no-plugin`` leaves more out than the file, never less."""


@attrs.frozen
class Document:
    """A configuration as written: merged, with the place of every value, not yet checked.

    Attributes:
        name: what to call it in messages: the path as given, or "config".
        raw: section to keys to values, all layers merged.
        origins: who set each table, key and array element that is in ``raw``.
    """

    name: str
    raw: dict[str, Any]
    origins: Mapping[Path, Origin]

    @property
    def sections(self) -> tuple[str, ...]:
        """The sections in the order of the file; those with ``enabled = false`` count as absent."""
        return tuple(name for name, table in self.raw.items() if isinstance(table, dict) and not _is_off(table))

    @property
    def disabled(self) -> tuple[str, ...]:
        """The sections that are present with ``enabled = false``."""
        return tuple(name for name, table in self.raw.items() if isinstance(table, dict) and _is_off(table))

    def origin(self, path: str | Path) -> Origin:
        """Return who set the value at ``path``, or the nearest table around it.

        Args:
            path: a dotted string, or its parts (needed for array indices and odd keys).
        """
        parts = tuple(path.split(".")) if isinstance(path, str) else path
        while parts:
            if parts in self.origins:
                return self.origins[parts]
            parts = parts[:-1]
        return DEFAULT

    def problem(self, path: Path, message: str, **details: Any) -> Problem:
        """Make a problem that knows its place."""
        origin = self.origin(path)
        where = self.name if origin.kind == "default" else origin.text
        return Problem(path=dotted(path), message=message, where=where, **details)


def _is_off(table: dict[str, Any]) -> bool:
    return table.get(ENABLED) is False


def read(
    source: str | os.PathLike[str] | Mapping[str, Any] | None,
    *,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Document:
    """Read a configuration and apply the overrides; nothing is checked against a schema.

    Args:
        source: the path of a TOML file, a mapping of the same shape, or None for an empty configuration.
        overrides: ``section.key=value`` strings; values are read as TOML, and what is none is a string.
        environ: the environment; this process's own when omitted.

    Raises:
        ConfigError: the file is missing or not TOML, the mapping holds what TOML cannot, or an override is malformed.
    """
    if source is None:
        document = Document("config", {}, {})
    elif isinstance(source, Mapping):
        document = _from_mapping(source)
    else:
        document = _from_file(os.fspath(source))
    layers = [*from_environment(os.environ if environ is None else environ), *from_settings(overrides)]
    return _apply(document, layers) if layers else document


def _from_file(name: str) -> Document:
    import tomli

    from powertrain.config.positions import positions

    text = _text(name)
    try:
        raw = tomli.loads(text)
        places = positions(text)
    except RecursionError:
        raise error(name, [Problem(path="", message="not valid TOML: nested too deeply", where=name)]) from None
    except ValueError as exception:
        # TOMLDecodeError is one; int() raises a plain one for a number of thousands of digits.
        raise error(name, [_syntax_problem(name, text, str(exception))]) from None
    origins = {path: Origin("file", f"{name}:{line}:{column}") for path, (line, column) in places.items()}
    return Document(name, raw, origins)


def _text(name: str) -> str:
    path = pathlib.Path(name)
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise _missing(path) from None
    except UnicodeDecodeError as exception:
        raise error(name, [Problem(path="", message=f"not UTF-8 text at byte {exception.start}", where=name)]) from None
    except (OSError, ValueError) as exception:
        reason = exception.strerror if isinstance(exception, OSError) else str(exception)
        raise error(name, [Problem(path="", message=f"cannot be read: {reason}", where=name)]) from None


def _missing(path: pathlib.Path) -> ConfigError:
    folder = path.parent
    present = [entry.name for entry in folder.iterdir() if entry.suffix == ".toml"] if folder.is_dir() else []
    near = nearest(path.name, present)
    problem = Problem(
        path="",
        message="no such file",
        where=str(path),
        suggestion=" or ".join(str(folder / name) for name in near) or None,
        found=None if near or not present else f"{', '.join(sorted(present)[:5])} in {folder}",
    )
    return error(str(path), [problem], remedy="`powertrain config init` writes a commented file to start from")


def _syntax_problem(name: str, text: str, message: str) -> Problem:
    match = _AT.match(message)
    if match is None:
        return Problem(path="", message=f"not valid TOML: {message}", where=name)
    lines = text.split("\n")
    line = int(match["line"] or len(lines))
    column = int(match["column"] or len(lines[-1]) + 1)
    return Problem(path="", message=f"not valid TOML: {match['what']}", where=f"{name}:{line}:{column}")


def _from_mapping(source: Mapping[str, Any]) -> Document:
    origin = Origin("argument", "config argument")
    origins: dict[Path, Origin] = {}
    problems: list[Problem] = []

    def plain(value: Any, path: Path) -> Any:
        if path:
            origins[path] = origin
        if isinstance(value, Mapping):
            table = {}
            for name, item in value.items():
                if isinstance(name, str):
                    table[name] = plain(item, (*path, name))
                else:
                    problems.append(
                        Problem(
                            path=dotted(path),
                            message="wrong type of key",
                            where=origin.text,
                            expected="a string",
                            found=repr(name),
                        )
                    )
            return table
        if isinstance(value, (list, tuple)):
            return [plain(item, (*path, index)) for index, item in enumerate(value)]
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    try:
        raw = plain(source, ())
    except RecursionError:
        problems.append(Problem(path="", message="nested too deeply", where=origin.text))
    if problems:
        raise error("config", problems)
    return Document("config", raw, origins)


def _apply(document: Document, layers: Sequence[Override | Problem]) -> Document:
    problems = [layer for layer in layers if isinstance(layer, Problem)]
    raw, origins = _copy(document.raw), dict(document.origins)
    for layer in layers:
        if isinstance(layer, Problem):
            continue
        blocked = _put(raw, origins, layer)
        if blocked is not None:
            problems.append(
                Problem(
                    path=dotted(layer.path),
                    message=f"{dotted(blocked)} is not a table, so nothing can be set below it",
                    where=layer.origin.text,
                )
            )
    if problems:
        raise error(document.name, problems)
    return Document(document.name, raw, origins)


def _put(raw: dict[str, Any], origins: dict[Path, Origin], override: Override) -> Path | None:
    """Set one value in place; return the path that stands in the way, if one does."""
    path: Path = ()
    node: Any = raw
    for depth, part in enumerate(override.path):
        if not isinstance(node, dict):
            return path
        name = _existing(node, part) if override.fold_case else part
        path = (*path, name)
        if depth == len(override.path) - 1:
            old = {place: origins.pop(place) for place in [*origins] if place[: len(path)] == path}
            value, before = override.value, node.get(name)
            adds = path == DISABLE and override.origin.kind == "environment"
            if adds and isinstance(before, list) and isinstance(value, list):
                value = [*before, *(item for item in value if item not in before)]
            else:
                old.clear()
            _mark(value, path, override.origin, origins)
            origins.update({place: origin for place, origin in old.items() if place != path})
            node[name] = value
        else:
            origins.setdefault(path, override.origin)
            node = node.setdefault(name, {})
    return None


def _existing(table: dict[str, Any], name: str) -> str:
    return next((present for present in table if present.lower() == name), name)


def _mark(value: Any, path: Path, origin: Origin, origins: dict[Path, Origin]) -> None:
    origins[path] = origin
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        _mark(item, (*path, name), origin, origins)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
