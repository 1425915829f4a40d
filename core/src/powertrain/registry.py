"""Finds, loads, checks and calls the plugins of one engine.

stevedore loads exactly the entry points that the configuration names, pluggy
holds what was registered and calls it. pluggy's own entry-point loader is not
used: it keeps the file system's order, drops a second claim to a name in
silence, and lets one broken import end the program.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import attrs
import pluggy

from powertrain import hookspecs
from powertrain.environment import setting
from powertrain.errors import (
    HookInvalid,
    PluginBroken,
    PluginConflict,
    PluginError,
    PluginIncompatible,
    PluginMissing,
)
from powertrain.plugin import API, Plugin
from powertrain.text import did_you_mean

if TYPE_CHECKING:
    from powertrain.config import Config, Document

GROUP = "powertrain.plugins"
"""The entry-point group of every plugin."""

ROLES = ("accelerator", "communicator", "checkpoint")
"""Roles whose providers are asked although no section names them (keyword ``powertrain-<role>``)."""

_log = logging.getLogger("powertrain.plugins")


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
    _check_declarations(plugin, where)
    if plugin.name != name:
        raise PluginBroken(
            f"the entry point {name!r} leads to a plugin that calls itself {plugin.name!r}",
            where=where,
            remedy="give the entry point and the class the same name",
        )
    return plugin


def _check_declarations(plugin: type[Plugin[Any]], where: str) -> None:
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


class Registry:
    """The plugins of one engine, in the order in which they act.

    Attributes:
        plugins: the constructed plugins by name.
    """

    def __init__(self, plugins: Iterable[Plugin[Any]], pin: Mapping[str, str] | None = None) -> None:
        """Register ``plugins`` in the given order.

        Raises:
            HookInvalid: one of them does not match the specifications.
            PluginConflict: two have the same name.
        """
        self.plugins: dict[str, Plugin[Any]] = {}
        self._pin = dict(pin or {})
        self._manager = pluggy.PluginManager("powertrain")
        self._manager.add_hookspecs(hookspecs)
        if setting("POWERTRAIN_TRACE_HOOKS") == "1":
            self._manager.add_hookcall_monitoring(lambda *_: None, self._trace)
        self._started = time.perf_counter()
        for plugin in plugins:
            self.add(plugin)

    def add(self, plugin: Plugin[Any]) -> None:
        """Register one more plugin, after those that are there."""
        if plugin.name in self.plugins:
            raise PluginConflict(f"two plugins are called {plugin.name!r}")
        where = f"{type(plugin).__module__}.{type(plugin).__qualname__}"
        _check_declarations(type(plugin), where)
        try:
            self._manager.register(plugin, name=plugin.name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            self._manager.unregister(plugin)
            specs = [n for n in dir(hookspecs) if getattr(getattr(hookspecs, n), "powertrain_spec", None) is not None]
            unknown = next((hook for hook in hooks_of(plugin) if hook not in specs), None)
            if unknown is not None:
                raise HookInvalid(
                    f"plugin {plugin.name!r} implements a hook that does not exist: {unknown}",
                    where=f"{where}.{unknown}",
                    remedy=f"known hooks: {', '.join(specs)}{did_you_mean(unknown, specs)}",
                ) from error
            raise HookInvalid(
                f"a hook of plugin {plugin.name!r} does not match its specification",
                where=where,
                found=" ".join(str(error).split()),
            ) from error
        self.plugins[plugin.name] = plugin

    def remove(self, name: str) -> None:
        """Forget a plugin."""
        self._manager.unregister(self.plugins.pop(name))

    def answers(self, hook: str, /, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Ask each plugin in turn; yield the name and the answer of those that give one."""
        for name in list(self.plugins):
            answer = self.call(name, hook, **arguments)
            if answer is not None:
                yield name, answer

    def one(self, hook: str, /, **arguments: Any) -> Any:
        """Return the only answer to a first-result hook, or None when nobody answers.

        Raises:
            PluginConflict: two plugins answer, and no pin chooses between them.
        """
        pinned = self._pin.get(hook)
        given = [(name, answer) for name, answer in self.answers(hook, **arguments) if pinned in (None, name)]
        if pinned is not None and not given:
            raise PluginError(
                f"the pinned plugin {pinned!r} does not answer the hook {hook}",
                where=f"plugins.pin.{hook}",
                expected=f"one of {', '.join(n for n, p in self.plugins.items() if hook in hooks_of(p)) or 'none'}",
            )
        if len(given) > 1:
            names = " and ".join(repr(name) for name, _ in given)
            raise PluginConflict(
                f"plugins {names} both answer the hook {hook}",
                remedy=f'leave one out, or choose: [plugins] pin = {{ {hook} = "{given[0][0]}" }}',
            )
        return given[0][1] if given else None

    def transforms(self) -> list[str]:
        """Return the names of the plugins that transform the model, by phase, then in order."""
        names = [name for name, plugin in self.plugins.items() if "transform_model" in hooks_of(plugin)]
        return sorted(names, key=lambda name: self.plugins[name].phase or 0)

    def call(self, plugin: str, hook: str, /, **arguments: Any) -> Any:
        """Return one plugin's answer to a hook, or None; no other plugin is asked."""
        if hook not in hooks_of(self.plugins[plugin]):
            return None
        others = [other for name, other in self.plugins.items() if name != plugin]
        return next(iter(self._manager.subset_hook_caller(hook, others)(**arguments)), None)

    def listeners(self, event: str) -> list[Any]:
        """Return the callables of an event, to be called directly from now on."""
        return [_trimmed(getattr(plugin, event)) for plugin in self.plugins.values() if event in hooks_of(plugin)]

    def _trace(self, outcome: Any, hook: str, impls: Sequence[Any], _arguments: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        result = outcome.get_result() if outcome.exception is None else outcome.exception
        row = {
            "hook": hook,
            "plugins": [impl.plugin_name for impl in impls],
            "ms": round((now - self._started) * 1000, 3),
            "result": [type(r).__name__ for r in result] if isinstance(result, list) else type(result).__name__,
        }
        print(json.dumps(row), file=sys.stderr)  # noqa: T201  asked for by the variable


def _trimmed(method: Any) -> Any:
    """Return ``method``, dropping keyword arguments that it does not take, as pluggy would."""
    import inspect

    taken = set(inspect.signature(method).parameters)
    return lambda **arguments: method(**{k: v for k, v in arguments.items() if k in taken})


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
