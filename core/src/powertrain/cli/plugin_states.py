"""What every installed plugin is good for here, and why not where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import attrs

from powertrain import discovery, environment
from powertrain.discovery import Installed
from powertrain.errors import PluginBroken, PluginConflict, PluginError, PluginIncompatible
from powertrain.plugin import Plugin
from powertrain.registry import Registry

Condition = Literal["available", "disabled", "broken", "conflict", "incompatible"]


@attrs.frozen(kw_only=True)
class PluginState:
    """One installed plugin.

    Attributes:
        name: the entry point's name and the section's.
        distribution: what installed it.
        version: of the distribution.
        api: the plugin API it was written for; None where it could not be imported.
        hooks: the hooks it implements.
        roles: the roles its metadata says it fills.
        state: whether a run can use it.
        why: the reason, in a few words.
        support: ``first-party``, ``community``, or None where it could not be imported.
        maintainer: the distribution's author.
        summary: the distribution's one-line description.
        device: the answer of an accelerator's own probe, where it was asked.
    """

    name: str
    distribution: str
    version: str
    api: int | None
    hooks: list[str]
    roles: list[str]
    state: Condition
    why: str
    support: str | None
    maintainer: str
    summary: str
    device: str | None = None


def usable(known: dict[str, Installed]) -> Iterator[tuple[Installed, Plugin[Any] | None, PluginError | None]]:
    """Yield every plugin that is not turned off, constructed with default settings, or its error.

    A plugin whose table has required keys cannot be constructed without a
    configuration: it is yielded with neither.
    """
    for name, entry in known.items():
        if _turned_off(name) is None:
            try:
                yield entry, construct(_load(entry, known), entry), None
            except PluginError as error:
                yield entry, None, error


def _load(entry: Installed, known: dict[str, Installed]) -> type[Plugin[Any]]:
    try:
        return discovery.load(entry.name, known)
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # a module meant as a script must not end the listing
        raise PluginBroken(
            f"plugin {entry.name!r} cannot be imported",
            where=f"{entry.target} of {entry.distribution} {entry.version}",
            found=f"{type(error).__name__}: {error}",
        ) from error


def construct(kind: type[Plugin[Any]], entry: Installed) -> Plugin[Any] | None:
    """Return the plugin with default settings, or None if its table has required keys.

    Raises:
        PluginBroken: the table or the plugin raises.
    """
    fields = getattr(kind.Config, "__attrs_attrs__", ())
    if any(field.init and field.default is attrs.NOTHING for field in fields):
        return None
    try:
        return kind(kind.Config())
    except Exception as error:
        raise PluginBroken(
            f"plugin {entry.name!r} cannot be constructed",
            where=f"{entry.target} of {entry.distribution} {entry.version}",
            found=f"{type(error).__name__}: {error}",
        ) from error


def survey(*, probe: bool = False) -> list[PluginState]:
    """Return the state of every installed plugin, in name order.

    Args:
        probe: also ask each accelerator whether its device is there; this may import torch.
    """
    known = discovery.installed()
    return [_state(entry, known, probe) for entry in known.values()]


def _state(entry: Installed, known: dict[str, Installed], probe: bool) -> PluginState:
    kind: type[Plugin[Any]] | None = None
    device: str | None = None
    state: Condition = "available"
    if (off := _turned_off(entry.name)) is not None:
        state, why = "disabled", off
    else:
        try:
            kind = _load(entry, known)
            plugin = construct(kind, entry)
            if plugin is not None:
                Registry([plugin])  # a misspelt hook is found here, not in the first run
            why = _when(entry)
            if probe and "accelerator" in entry.roles and plugin is not None:
                device = _probe(plugin)
        except PluginError as error:
            state, why = _condition(error), _reason(error, entry)
    return PluginState(
        name=entry.name,
        distribution=entry.distribution,
        version=entry.version,
        api=kind.api if kind else None,
        hooks=discovery.hooks_of(kind) if kind else [],
        roles=sorted(entry.roles),
        state=state,
        why=why,
        support=kind.support if kind else None,
        maintainer=entry.author,
        summary=entry.summary,
        device=device,
    )


def _turned_off(name: str) -> str | None:
    if name in environment.disabled_plugins():
        return "disabled by --no-plugin or POWERTRAIN__PLUGINS__DISABLE"
    only = discovery.allowed()
    return None if only is None or name in only else "disabled by POWERTRAIN_PLUGINS"


def _when(entry: Installed) -> str:
    if named := sorted(entry.roles - {"files"}):
        return f"asked by runs that name no {' or '.join(named)}"
    if entry.roles:
        return f"moves bytes to and from files for every run; on with a [{entry.name}] section"
    return f"on with a [{entry.name}] section"


def _probe(plugin: Plugin[Any]) -> str:
    try:
        answer = plugin.is_available()
    except Exception as error:
        return f"no: its probe raised {type(error).__name__}: {error}"
    return f"{'yes' if answer.available else 'no'}: {answer.reason}"


def _condition(error: PluginError) -> Condition:
    if isinstance(error, PluginConflict):
        return "conflict"
    return "incompatible" if isinstance(error, PluginIncompatible) else "broken"


def _reason(error: PluginError, entry: Installed) -> str:
    if isinstance(error, PluginConflict):
        return f"also claimed by {', '.join(entry.rivals)}"
    return detail(error, entry.name)


def detail(error: PluginError, name: str) -> str:
    """Return in one line what is wrong with a plugin whose name stands beside it."""
    message = error.message.removeprefix(f"plugin {name!r} ")
    # Where an exception was the cause, `found` holds it.
    text = error.found if error.found and error.__cause__ else f"{message}: {error.found}" if error.found else message
    return " ".join(text.split())
