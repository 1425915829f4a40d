"""Shows what a run does: its collectives, their bytes, time and bandwidth."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from powertrain.engine import Engine

__version__ = "0.1.0"


def comm_table(engine: Engine) -> str:
    """Return the table of collectives so far of an engine that runs with ``[observe] comm = true``.

    Empty where nothing was traced.
    """
    from powertrain_observe.table import render

    return render(engine.context.communicator.traffic(), engine.context.communicator.size)
