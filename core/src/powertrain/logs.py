"""Where the ``powertrain`` loggers write: standard error, one voice per run.

The library itself only logs. A program that wants to see it calls
``configure`` once; the ``powertrain`` command and its workers do.
"""

from __future__ import annotations

import logging
import sys

from powertrain.environment import log_level


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever ``sys.stderr`` is when the message comes."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        return sys.stderr


def configure(rank: int = 0, *, level: str | None = None) -> None:
    """Send the messages of the ``powertrain`` loggers to standard error.

    Rank 0 shows INFO and above. Other ranks show warnings and errors only, so
    that a message every rank agrees on appears once; their lines start with
    ``[rank N]``. Calling it again replaces the earlier settings.

    Args:
        rank: this process's global rank.
        level: debug, info, warning or error; absent, ``POWERTRAIN_LOG`` decides. Debug holds on every rank.

    Raises:
        LaunchError: ``POWERTRAIN_LOG`` names no level.
    """
    chosen = logging.getLevelName((level or log_level() or "info").upper())
    logger = logging.getLogger("powertrain")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
        logger.removeHandler(handler)
    handler = _Handler()
    prefix = f"[rank {rank}] " if rank else ""
    handler.setFormatter(logging.Formatter(f"{prefix}%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(chosen if rank == 0 or chosen == logging.DEBUG else max(chosen, logging.WARNING))
    logger.propagate = False
