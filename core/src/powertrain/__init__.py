"""Powertrain: a minimal training engine composed from plugins at run time.

Importing this package imports neither torch nor any plugin, reads no
environment variable and starts nothing: every public name is resolved on
first use.

    >>> import powertrain
    >>> engine = powertrain.initialize(model, config="train.toml")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powertrain.access import full
    from powertrain.build import initialize
    from powertrain.context import Context
    from powertrain.deferral import deferred
    from powertrain.engine import Engine
    from powertrain.errors import PowertrainError
    from powertrain.hookspecs import hookimpl
    from powertrain.parameter_state import state
    from powertrain.plugin import Phase, Plugin, Probe
    from powertrain.streaming import stream

__version__ = "0.1.0"

_HOMES = {
    "Context": "powertrain.context",
    "Engine": "powertrain.engine",
    "Phase": "powertrain.plugin",
    "Plugin": "powertrain.plugin",
    "PowertrainError": "powertrain.errors",
    "Probe": "powertrain.plugin",
    "deferred": "powertrain.deferral",
    "full": "powertrain.access",
    "hookimpl": "powertrain.hookspecs",
    "initialize": "powertrain.build",
    "state": "powertrain.parameter_state",
    "stream": "powertrain.streaming",
}

__all__ = [
    "Context",
    "Engine",
    "Phase",
    "Plugin",
    "PowertrainError",
    "Probe",
    "__version__",
    "deferred",
    "full",
    "hookimpl",
    "initialize",
    "state",
    "stream",
]


def __getattr__(name: str) -> Any:
    """Import the home of a public name when it is first asked for (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'powertrain' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
