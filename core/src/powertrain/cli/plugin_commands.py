"""The subcommands that installed plugins add through ``add_commands``."""

from __future__ import annotations

import inspect

import click

from powertrain import discovery, environment
from powertrain.cli.plugin_states import detail, usable
from powertrain.discovery import Installed
from powertrain.errors import PluginBroken, PluginError


def collect(taken: set[str]) -> dict[str, click.Command]:
    """Return the commands of all plugins by name.

    A plugin that fails adds nothing and costs one line on standard error,
    unless ``POWERTRAIN_STRICT_PLUGINS=1``. A name that is ``taken``, or that
    two plugins want, is given to neither.

    Raises:
        PluginError: a plugin is broken and plugins are strict.
    """
    offers: dict[str, list[tuple[str, click.Command]]] = {}
    for entry, plugin, error in usable(discovery.installed()):
        if error is not None:
            _warn(entry, error)
        elif (source := plugin or _static(entry)) is not None and "add_commands" in discovery.hooks_of(source):
            try:
                for name, command in _commands(source, entry).items():
                    offers.setdefault(name, []).append((entry.name, command))
            except PluginError as broken:
                _warn(entry, broken)
    result = {}
    for name, claims in offers.items():
        owners = [repr(plugin) for plugin, _ in claims] + (["powertrain itself"] if name in taken else [])
        if len(owners) == 1:
            result[name] = claims[0][1]
        else:
            click.echo(f"Warning: the command {name!r} is left out: {' and '.join(owners)} claim it", err=True)
    return result


def _static(entry: Installed) -> type | None:
    """Return the class of a plugin whose table has required keys, so that it is no object here.

    It can still add commands, if its hook is static.
    """
    kind = discovery.load(entry.name)
    return kind if isinstance(inspect.getattr_static(kind, "add_commands", None), staticmethod) else None


def _commands(plugin: object, entry: Installed) -> dict[str, click.Command]:
    # A group of its own, so that a hook that fails halfway leaves nothing behind.
    group = click.Group()
    try:
        plugin.add_commands(cli=group)  # type: ignore[attr-defined]
    except Exception as error:
        raise PluginBroken(
            f"plugin {entry.name!r} cannot add its commands",
            where=f"{entry.target} of {entry.distribution} {entry.version}",
            found=f"{type(error).__name__}: {error}",
        ) from error
    return dict(group.commands)


def _warn(entry: Installed, error: PluginError) -> None:
    if environment.strict_plugins():
        raise error
    source = f"{entry.target} of {entry.distribution} {entry.version}"
    cause = detail(error, entry.name)
    hint = f"silence this with --no-plugin {entry.name}"
    click.echo(f"Warning: plugin {entry.name!r} ({source}) is left out: {cause}; {hint}", err=True)
