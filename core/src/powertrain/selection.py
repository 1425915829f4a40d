"""Which of the installed plugins take part in a run, and in which order."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import attrs

from powertrain import hookspecs
from powertrain.config import DEFAULT, Config, Problem
from powertrain.config.origin import key, quoted
from powertrain.config.problem import error as configuration_error
from powertrain.config.record import expected, keys, type_hints
from powertrain.discovery import Installed, Schemas, allowed, installed, load
from powertrain.environment import setting, strict_plugins
from powertrain.errors import PluginBroken, PluginError, PluginMissing
from powertrain.plugin import Plugin
from powertrain.text import did_you_mean, nearest

_log = logging.getLogger("powertrain.plugins")


def select(
    config: Config,
    schemas: Schemas,
    *,
    world_size: int,
    given: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> list[Plugin[Any]]:
    """Construct the plugins of a run: sections first, then required ones, then role providers.

    Those that are ``given`` exist already and are left out. A role provider that
    nothing names and that is broken costs a warning, not the run
    (``POWERTRAIN_STRICT_PLUGINS=1`` makes it fatal).

    Raises:
        PluginError: a plugin that the configuration names cannot be used.
    """
    given = frozenset(given)
    check_names(config, schemas, given=given, environ=environ)
    only = allowed(environ)
    strict = strict_plugins(environ)
    known = installed(config.plugins.pin)
    named, direct = _named(config, schemas, known)
    wanted = {"accelerator", "checkpoint", "files"} | ({"communicator"} if world_size > 1 else set())
    providers = [
        name
        for name, entry in known.items()
        if entry.roles & wanted and not ("accelerator" in entry.roles and direct not in (None, name))
    ]
    chosen: list[Plugin[Any]] = []
    for name in [*named, *(name for name in providers if name not in named)]:
        if name in config.plugins.disable or name in given:
            continue
        if only is not None and name not in only:
            continue
        try:
            plugin = schemas.classes.get(name) or load(name, known)
            chosen.append(_constructed(plugin, config.tables.get(name), known.get(name)))
        except PluginError as error:
            if strict or name in named or name == direct:
                raise
            _log.warning("plugin %r is skipped: %s", name, " ".join(str(error).split()))
    return chosen


def check_names(
    config: Config,
    schemas: Schemas,
    *,
    given: Collection[str] = (),
    environ: Mapping[str, str] | None = None,
) -> None:
    """Check every plugin that ``config`` names, without constructing one.

    Args:
        config: the structured configuration.
        schemas: what ``schemas_for`` returned for the same document.
        given: plugins that exist already as objects.
        environ: the environment; this process's own when omitted.

    Raises:
        ConfigError: ``[plugins]`` names what is not installed, requires what it disables, or requires a
            plugin whose table cannot be left out.
        PluginError: a requirement is not met, or ``POWERTRAIN_PLUGINS`` does not allow a plugin.
    """
    known = installed(config.plugins.pin)
    if problems := list(_misnamed(config, {**dict.fromkeys(schemas.installed), **known})):
        raise configuration_error(config.name, problems)
    only = allowed(environ)
    named, direct = _named(config, schemas, known)
    for name in [*named, *([direct] if direct else [])]:
        if only is not None and name not in {*only, *given, *config.plugins.disable}:
            raise PluginMissing(
                f"the configuration needs plugin {name!r}, which POWERTRAIN_PLUGINS does not allow",
                where=f"POWERTRAIN_PLUGINS={setting('POWERTRAIN_PLUGINS', environ)}",
                remedy="add it to the variable, or leave its section out",
            )
    if problems := list(_without_table(config, schemas, [name for name in named if name not in given], known)):
        raise configuration_error(config.name, problems)


def _named(config: Config, schemas: Schemas, known: Mapping[str, Installed]) -> tuple[list[str], str | None]:
    """Return the plugins that the configuration names, and the accelerator that it names by its entry point.

    No other accelerator needs to be looked at then.
    """
    required = [_required(text, known) for text in config.plugins.require]
    direct = config.accelerator.use if config.accelerator.use in known else None
    return [*schemas.classes, *(name for name in required if name not in schemas.classes)], direct


def _misnamed(config: Config, known: Mapping[str, Installed | None]) -> Iterator[Problem]:
    """Yield what is wrong with the names in ``[plugins]``."""
    table = config.plugins
    owners = {entry.distribution: name for name, entry in known.items() if entry is not None}
    rivals = {rival for entry in known.values() if entry is not None for rival in entry.rivals}
    hooks = [name for name, item in vars(hookspecs).items() if hasattr(item, "powertrain_spec")]

    def problem(place: str, message: str, name: str, choices: Iterable[str]) -> Problem:
        origin = config.origins.get(f"plugins.{place.partition('[')[0]}", DEFAULT)
        near = nearest(name, choices)
        where = config.name if origin is DEFAULT else str(origin)
        return Problem(path=f"plugins.{place}", message=message, where=where, suggestion=near and quoted(near))

    for index, name in enumerate(table.disable):
        if name not in known:
            yield problem(f"disable[{index}]", f"no plugin called {name!r} is installed", name, known)
    for index, text in enumerate(table.require):
        bare = re.split(r"[^\w.-]", text.strip(), maxsplit=1)[0]
        if owners.get(bare, bare) in table.disable:
            yield problem(f"require[{index}]", f"plugins.disable leaves {bare!r} out", bare, ())
    for name, choice in table.pin.items():
        if name not in known and name not in hooks:
            message = f"there is no hook and no installed plugin called {name!r}"
            yield problem(f"pin.{key(name)}", message, name, [*hooks, *known])
        if choice not in {*known, *owners, *rivals}:
            message = f"no plugin or distribution called {choice!r} is installed"
            yield problem(f"pin.{key(name)}", message, choice, [*known, *owners, *rivals])


def _without_table(
    config: Config, schemas: Schemas, named: Iterable[str], known: Mapping[str, Installed]
) -> Iterator[Problem]:
    """Yield the keys without a default of plugins that are required and have no section."""
    for name in named:
        if name in schemas.classes:
            continue
        table = load(name, known).Config
        for field_name, field in keys(table).items():
            if field.default is attrs.NOTHING:
                yield Problem(
                    path=f"{name}.{field_name}",
                    message=f"required key is missing: plugins.require asks for {name!r}, but [{name}] is not on",
                    where=str(config.origins.get("plugins.require", config.name)),
                    expected=expected(field, type_hints(table)[field_name]),
                )


def _constructed(plugin: type[Plugin[Any]], table: Any, entry: Installed | None) -> Plugin[Any]:
    try:
        return plugin(plugin.Config() if table is None else table)
    except Exception as error:
        raise PluginBroken(
            f"plugin {plugin.name!r} cannot be constructed",
            where=entry.target if entry else plugin.__qualname__,
            found=f"{type(error).__name__}: {error}",
        ) from error


def _required(text: str, known: Mapping[str, Installed]) -> str:
    """Return the plugin that a requirement names, after checking its version."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise PluginError(
            f"{text!r} is not a requirement", where="plugins.require", expected='"zero" or "powertrain-zero>=0.1,<1"'
        ) from error
    name = next((n for n, e in known.items() if requirement.name in (n, e.distribution)), None)
    if name is None:
        raise PluginMissing(
            f"the required plugin {requirement.name!r} is not installed",
            where="plugins.require",
            expected=f"one of the installed ones: {', '.join(known) or 'none'}",
            remedy=f"pip install '{text if text.startswith('powertrain-') else 'powertrain-' + text}'"
            + did_you_mean(requirement.name.removeprefix("powertrain-"), known, before=", or did you mean "),
        )
    if not requirement.specifier.contains(known[name].version, prereleases=True):
        raise PluginError(
            f"plugin {name!r} has the wrong version",
            where="plugins.require",
            expected=str(requirement.specifier),
            found=known[name].version,
            remedy=f"pip install '{known[name].distribution}{requirement.specifier}'",
        )
    return name
