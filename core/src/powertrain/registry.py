"""The plugins of one engine: registered, checked, and asked in order.

pluggy holds them. Its own entry-point loader is not used: it keeps the file
system's order, drops a second claim to a name in silence, and lets one broken
import end the program (see ``powertrain.discovery``).
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pluggy

from powertrain import hookspecs
from powertrain.discovery import check_declarations, hooks_of
from powertrain.environment import setting
from powertrain.errors import HookInvalid, PluginConflict, PluginError
from powertrain.plugin import Plugin
from powertrain.text import did_you_mean


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
        check_declarations(type(plugin), where)
        try:
            self._manager.register(plugin, name=plugin.name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            if self._manager.is_registered(plugin):  # not where an argument was wrong: pluggy has dropped it then
                self._manager.unregister(plugin)
            specs = [n for n in dir(hookspecs) if getattr(getattr(hookspecs, n), "powertrain_spec", None) is not None]
            unknown = next((hook for hook in hooks_of(plugin) if hook not in specs), None)
            if unknown is not None:
                raise HookInvalid(
                    f"plugin {plugin.name!r} implements a hook that does not exist: {unknown}",
                    where=f"{where}.{unknown}",
                    expected=f"one of {', '.join(specs)}",
                    remedy=f"rename it, or drop @hookimpl{did_you_mean(unknown, specs)}",
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

    def wrappers(self) -> list[str]:
        """Return the names of the plugins that wrap the communicator, by layer, then in order."""
        names = [name for name, plugin in self.plugins.items() if "wrap_communicator" in hooks_of(plugin)]
        return sorted(names, key=lambda name: self.plugins[name].layer)

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
    taken = set(inspect.signature(method).parameters)
    return lambda **arguments: method(**{k: v for k, v in arguments.items() if k in taken})
