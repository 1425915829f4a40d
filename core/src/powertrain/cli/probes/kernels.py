"""The probe of what is built in C++; it builds nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from powertrain.cli.kernels import sets, state_of
from powertrain.cli.probes import Check
from powertrain.environment import cache_directory


def kernels() -> Iterator[Check]:
    """Where kernels are cached, and the state of each set."""
    directory = cache_directory()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    writable = os.access(existing, os.W_OK | os.X_OK) and existing.is_dir()
    yield Check(
        "kernels",
        "cache",
        "ok" if writable else "warn",
        str(directory) if writable else f"{directory} cannot be written",
        "" if writable else "set POWERTRAIN_CACHE to a directory that can be written: kernels are built into it",
    )
    for plugin, each in sets():
        state = state_of(plugin, each)
        missing = state.state == "no compiler"
        found = state.state
        if state.seconds is not None:
            found = f"built in {state.seconds:.1f} s: {Path(state.where).parent.name}"
        elif state.state == "not built":
            found = "not built: it will be when it is first used"
        yield Check("kernels", each.name, "warn" if missing else "ok", found, state.where if missing else "")
