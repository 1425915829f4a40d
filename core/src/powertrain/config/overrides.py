"""Single values from outside the file: ``--set zero.stage=2`` and ``POWERTRAIN__ZERO__STAGE=2``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import tomli

from powertrain.config.origin import Origin, dotted
from powertrain.config.problem import Problem
from powertrain.config.suggest import nearest

PREFIX = "POWERTRAIN__"
VARIABLES = {
    "POWERTRAIN_PLUGINS": 'the only plugins that may be loaded, by name and comma-separated, or "none"',
    "POWERTRAIN_STRICT_PLUGINS": "1 makes a broken plugin an error even where nothing needs it",
    "POWERTRAIN_TRACE_HOOKS": "1 prints every call of a hook",
    "POWERTRAIN_LOG": "level of the log: debug, info, warning or error",
    "POWERTRAIN_CACHE": "directory of what can be made again, such as kernels",
    "POWERTRAIN_NATIVE": "0 leaves C++ kernels out: their references run",
    "POWERTRAIN_BUILD_TIMEOUT": "seconds that a build of C++, or waiting for one, may take",
}
"""The variables that are no configuration keys, and what each does."""

logger = logging.getLogger("powertrain.config")


@attrs.frozen
class Override:
    """One value set from outside the file.

    Attributes:
        path: section, then key, then deeper keys.
        value: the value, read as TOML.
        origin: who set it.
        fold_case: whether the path's case says nothing, as in a variable's name.
    """

    path: tuple[str, ...]
    value: Any
    origin: Origin
    fold_case: bool = False


def from_environment(environ: Mapping[str, str]) -> Iterator[Override | Problem]:
    """Read the ``POWERTRAIN__SECTION__KEY`` variables, in the order of their names.

    Any other variable that starts with ``POWERTRAIN_`` and is not one of ``VARIABLES`` is logged as a warning.
    """
    for name in sorted(environ):
        if not name.startswith("POWERTRAIN_"):
            continue
        if not name.startswith(PREFIX):
            if name not in VARIABLES:
                _warn_unknown(name)
            continue
        path = tuple(name[len(PREFIX) :].lower().split("__"))
        if len(path) < 2 or not all(path):
            yield Problem(
                path="", message="malformed variable", where=name, expected=f"{PREFIX}SECTION__KEY", found=name
            )
        else:
            yield Override(path, parse_value(environ[name]), Origin("environment", name), fold_case=True)


def from_settings(settings: Sequence[str]) -> Iterator[Override | Problem]:
    """Read ``section.key=value`` strings, in their order; a later one wins."""
    for setting in settings:
        left, equals, right = setting.partition("=")
        path = _parse_key(left.strip())
        if not equals or path is None or len(path) < 2:
            yield Problem(
                path="", message="malformed --set", where="--set", expected="section.key=value", found=repr(setting)
            )
        else:
            yield Override(path, parse_value(right.strip()), Origin("override", f"--set {dotted(path)}"))


def parse_value(text: str) -> Any:
    """Read text as a TOML value; what is none is a string."""
    try:
        table = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text


def _parse_key(text: str) -> tuple[str, ...] | None:
    try:
        table = tomli.loads(f"{text} = 0")
    except (ValueError, RecursionError):
        return None
    path: list[str] = []
    node: Any = table
    while isinstance(node, dict) and len(node) == 1:
        ((name, node),) = node.items()
        path.append(name)
    return None if isinstance(node, dict) else tuple(path)


def _warn_unknown(name: str) -> None:
    rest = name[len("POWERTRAIN_") :]
    known = [variable[len("POWERTRAIN_") :] for variable in VARIABLES]
    section, underscore, key = rest.replace("__", "_").partition("_")
    if underscore:
        known.append(f"_{section}__{key}")
    near = nearest(rest, known)
    hint = f"; did you mean POWERTRAIN_{near[0]}?" if near else ""
    logger.warning("%s is no variable that Powertrain reads%s", name, hint)
