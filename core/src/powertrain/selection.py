"""Which of the installed plugins take part in a run, and in which order."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from powertrain.config import Config
from powertrain.discovery import Installed, Schemas, allowed, installed, load
from powertrain.environment import setting
from powertrain.errors import PluginBroken, PluginError, PluginMissing
from powertrain.plugin import Plugin

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
    only = allowed(environ)
    strict = setting("POWERTRAIN_STRICT_PLUGINS", environ) == "1"
    known = installed(config.plugins.pin)
    required = [_required(text, known) for text in config.plugins.require]
    named = [*schemas.classes, *(name for name in required if name not in schemas.classes)]
    wanted = {"accelerator", "checkpoint"} | ({"communicator"} if world_size > 1 else set())
    # Named by its entry point, an accelerator is the only one that needs to be looked at.
    direct = config.accelerator.use if config.accelerator.use in known else None
    providers = [
        name
        for name, entry in known.items()
        if entry.roles & wanted and not ("accelerator" in entry.roles and direct not in (None, name))
    ]
    chosen: list[Plugin[Any]] = []
    for name in [*named, *(name for name in providers if name not in named)]:
        if name in config.plugins.disable or name in given:
            continue
        is_named = name in named or name == direct
        if only is not None and name not in only:
            if is_named:
                raise PluginMissing(
                    f"the configuration needs plugin {name!r}, which POWERTRAIN_PLUGINS does not allow",
                    where=f"POWERTRAIN_PLUGINS={setting('POWERTRAIN_PLUGINS', environ)}",
                    remedy="add it to the variable, or leave its section out",
                )
            continue
        try:
            plugin = schemas.classes.get(name) or load(name, known)
            chosen.append(_constructed(plugin, config.tables.get(name), known.get(name)))
        except PluginError as error:
            if is_named or strict:
                raise
            _log.warning("plugin %r is skipped: %s", name, " ".join(str(error).split()))
    return chosen


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
            remedy=f"pip install '{text if text.startswith('powertrain-') else 'powertrain-' + text}'",
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
