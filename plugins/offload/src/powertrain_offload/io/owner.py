"""Which process an engine belongs to: its threads exist in no other."""

from __future__ import annotations

import os

from powertrain.errors import EngineUnavailable


class Owner:
    """Remembers the process that made it."""

    __slots__ = ("process",)

    def __init__(self) -> None:
        self.process = os.getpid()

    def here(self) -> bool:
        """Return whether this is that process."""
        return os.getpid() == self.process

    def check(self) -> None:
        """Raise in another process.

        Raises:
            EngineUnavailable: this process was forked off the one that opened the engine.
        """
        if not self.here():
            raise EngineUnavailable(
                "a file engine does not work in a process that was forked off",
                expected=f"process {self.process}, which opened it",
                found=f"process {os.getpid()}",
                remedy="open an engine in each process, after it has started",
            )
