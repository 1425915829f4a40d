"""What can be told of a plugin without using it; imports no torch."""

from __future__ import annotations

from typing import Any

import attrs

from powertrain.discovery import hooks_of
from powertrain.plugin import Plugin
from powertrain.registry import Registry


def facts(plugin: type[Plugin[Any]]) -> dict[str, Any]:
    """Register the plugin with its default table, and return what a run would see, as JSON."""
    made = plugin(plugin.Config())
    registry = Registry([made])
    return {
        "name": made.name,
        "api": made.api,
        "hooks": hooks_of(made),
        "registered": list(registry.plugins),
        "phase": None if made.phase is None else int(made.phase),
        "fallback": made.fallback,
        "table": {field.name: repr(getattr(made.config, field.name)) for field in attrs.fields(plugin.Config)},
    }
