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
    from powertrain.build import initialize
    from powertrain.context import Context
    from powertrain.engine import Engine
    from powertrain.errors import PowertrainError
    from powertrain.hookspecs import hookimpl
    from powertrain.plugin import Phase, Plugin, Probe

__version__ = "0.1.0"

_HOMES = {
    "Context": "powertrain.context",
    "Engine": "powertrain.engine",
    "Phase": "powertrain.plugin",
    "Plugin": "powertrain.plugin",
    "PowertrainError": "powertrain.errors",
    "Probe": "powertrain.plugin",
    "hookimpl": "powertrain.hookspecs",
    "initialize": "powertrain.build",
}

__all__ = [
    "Context",
    "Engine",
    "Phase",
    "Plugin",
    "PowertrainError",
    "Probe",
    "__version__",
    "hookimpl",
    "initialize",
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
