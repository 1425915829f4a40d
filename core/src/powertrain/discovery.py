"""Which plugins are installed, and the one class that an entry point leads to.

Nothing is imported to list them; stevedore loads exactly those that are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import attrs

from powertrain.environment import setting
from powertrain.errors import HookInvalid, PluginBroken, PluginConflict, PluginIncompatible, PluginMissing
from powertrain.plugin import API, Plugin
from powertrain.text import did_you_mean

if TYPE_CHECKING:
    from powertrain.config import Document

GROUP = "powertrain.plugins"
"""The entry-point group of every plugin."""

ROLES = ("accelerator", "communicator", "checkpoint", "files")
"""Roles whose providers are asked although no section names them (keyword ``powertrain-<role>``)."""


@attrs.frozen(kw_only=True)
class Installed:
    """An installed plugin, as its distribution's metadata describes it.

    Attributes:
        name: the entry point's name.
        target: ``module:class``.
        distribution: the distribution that installed it.
        version: the distribution's version.
        summary: the distribution's one-line description.
        author: who maintains it.
        roles: which of ``ROLES`` it says it can fill.
        rivals: other distributions that claim the same name.
    """

    name: str
    target: str
    distribution: str
    version: str
    summary: str
    author: str
    roles: frozenset[str]
    rivals: tuple[str, ...] = ()


def installed(pin: Mapping[str, str] | None = None) -> dict[str, Installed]:
    """Return every installed plugin by name, in name order, importing none.

    Metadata order differs between machines, and ranks must not disagree.

    Args:
        pin: plugin name to the distribution that may have it.
    """
    claims: dict[str, list[Installed]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        dist = point.dist
        if dist is None:  # only entry points made by hand have none
            continue
        meta = dist.metadata
        words = {word.strip() for word in (meta["Keywords"] or "").replace(" ", ",").split(",")}
        plugin = Installed(
            name=point.name,
            target=point.value,
            distribution=dist.name,
            version=dist.version,
            summary=meta["Summary"] or "",
            author=meta["Author"] or meta["Author-email"] or "",
            roles=frozenset(role for role in ROLES if f"powertrain-{role}" in words),
        )
        same = claims.setdefault(point.name, [])
        # One distribution can be seen twice, through two entries of sys.path.
        if all(other.distribution != plugin.distribution for other in same):
            same.append(plugin)
    result = {}
    for name, same in claims.items():
        chosen = next((p for p in same if (pin or {}).get(name) == p.distribution), same[0])
        pinned = (pin or {}).get(name) == chosen.distribution
        rivals = () if pinned else tuple(p.distribution for p in same if p is not chosen)
        result[name] = attrs.evolve(chosen, rivals=rivals)
    return result


def allowed(environ: Mapping[str, str] | None = None) -> frozenset[str] | None:
    """Return the plugins that ``POWERTRAIN_PLUGINS`` allows; None when all are."""
    text = setting("POWERTRAIN_PLUGINS", environ)
    if text is None:
        return None
    return frozenset(name.strip() for name in text.split(",") if name.strip() and name.strip() != "none")


def load(name: str, known: Mapping[str, Installed] | None = None) -> type[Plugin[Any]]:
    """Import the class of the plugin called ``name`` and check it.

    Raises:
        PluginMissing: it is not installed.
        PluginConflict: several distributions claim the name.
        PluginBroken: it cannot be imported, or is no plugin class.
        PluginIncompatible: it was written for an API that this core does not serve.
    """
    from stevedore.named import NamedExtensionManager

    plugins = installed() if known is None else known
    if name not in plugins:
        raise PluginMissing(
            f"plugin {name!r} is not installed",
            expected=f"one of the installed ones: {', '.join(plugins) or 'none'}",
            remedy=f"pip install powertrain-{name}{did_you_mean(name, plugins, before=', or did you mean ')}",
        )
    entry = plugins[name]
    if entry.rivals:
        claims = " and ".join((entry.distribution, *entry.rivals))
        raise PluginConflict(
            f"plugin {name!r} is claimed by {claims}",
            remedy=f'uninstall all but one, or choose: [plugins] pin = {{ {name} = "{entry.distribution}" }}',
        )
    failures: list[BaseException] = []
    found: list[Any] = []
    try:
        manager: Any = NamedExtensionManager(
            GROUP,
            names=[name],
            invoke_on_load=False,
            on_load_failure_callback=lambda _manager, _point, error: failures.append(error),
        )
        found = [ext.plugin for ext in manager.extensions if ext.entry_point.value == entry.target]
    except (AssertionError, SystemExit) as error:  # stevedore lets these two through
        failures.append(error)
    where = f"{entry.target} of {entry.distribution} {entry.version}"
    if not found:
        cause = failures[0] if failures else None
        found_text = f"{type(cause).__name__}: {cause}" if cause else "the entry point could not be loaded"
        raise PluginBroken(f"plugin {name!r} cannot be imported", where=where, found=found_text) from cause
    return _checked(name, found[0], where)


def _checked(name: str, plugin: Any, where: str) -> type[Plugin[Any]]:
    if not (isinstance(plugin, type) and issubclass(plugin, Plugin)):
        raise PluginBroken(
            f"plugin {name!r} is not a Plugin class",
            where=where,
            expected="a subclass of powertrain.Plugin",
            found=repr(plugin),
        )
    check_declarations(plugin, where)
    if plugin.name != name:
        raise PluginBroken(
            f"the entry point {name!r} leads to a plugin that calls itself {plugin.name!r}",
            where=where,
            remedy="give the entry point and the class the same name",
        )
    return plugin


def check_declarations(plugin: type[Plugin[Any]], where: str) -> None:
    """Check what a plugin class says of itself, before anything of it runs."""
    if plugin.api not in (API, API - 1) or plugin.api < 1:
        newer = isinstance(plugin.api, int) and plugin.api > API
        raise PluginIncompatible(
            f"plugin {plugin.name!r} is written for plugin API {plugin.api}",
            where=where,
            expected=f"API {API}" + (f" or {API - 1}" if API > 1 else ""),
            remedy="upgrade powertrain-core" if newer else "upgrade the plugin's distribution",
        )
    if "transform_model" in hooks_of(plugin) and plugin.phase is None:
        raise HookInvalid(
            f"plugin {plugin.name!r} transforms the model but declares no phase",
            where=where,
            expected="a class attribute `phase = Phase.…`",
        )


def hooks_of(plugin: type[Plugin[Any]] | Plugin[Any]) -> list[str]:
    """Return the names of the hooks that a plugin implements, in alphabetical order."""
    marked = (name for name in dir(plugin) if not name.startswith("__"))
    return sorted(name for name in marked if getattr(getattr(plugin, name, None), "powertrain_impl", None))


@attrs.frozen(kw_only=True)
class Schemas:
    """What configuration may be written for the plugins that a document names.

    Attributes:
        tables: section name to attrs class.
        options: kind (``optimizer``, ``scheduler``) to name to attrs class.
        installed: the names of all installed plugins.
        classes: the loaded plugin classes, in the document's order.
    """

    tables: Mapping[str, type]
    options: Mapping[str, Mapping[str, type]]
    installed: Sequence[str]
    classes: Mapping[str, type[Plugin[Any]]]


def schemas_for(document: Document, extra: Iterable[Plugin[Any]] = ()) -> Schemas:
    """Load the plugin classes whose sections ``document`` has, and return their schemas.

    A section whose plugin is not installed is left to ``structure``, which
    reports it together with everything else that is wrong.
    """
    from powertrain.config.tables import CORE_TABLES

    known = installed(_pins(document))
    given = {plugin.name: type(plugin) for plugin in extra}
    names = [s for s in document.sections if s not in CORE_TABLES and s not in given and s in known]
    classes: dict[str, type[Plugin[Any]]] = {**given, **{name: load(name, known) for name in names}}
    options: dict[str, dict[str, type]] = {}
    for plugin in classes.values():
        for kind, by_name in plugin.options.items():
            options.setdefault(kind, {}).update(by_name)
    return Schemas(
        tables={name: plugin.Config for name, plugin in classes.items()},
        options=options,
        installed=sorted({*known, *given}),
        classes=classes,
    )


def _pins(document: Document) -> Mapping[str, str]:
    table = document.raw.get("plugins")
    pins = table.get("pin") if isinstance(table, Mapping) else None
    return pins if isinstance(pins, Mapping) else {}
