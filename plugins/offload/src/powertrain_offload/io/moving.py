"""A transfer as callers hold it, over whatever moves its bytes."""

from __future__ import annotations

from typing import Protocol

from powertrain_offload.io.failures import Failure, transfer_failed
from powertrain_offload.io.owner import Owner


class Moving(Protocol):
    """What an engine has under way. It holds its memory until it is over."""

    def wait(self) -> None:
        """Return when it is over, well or not; a signal's handler may end the wait."""

    def done(self) -> bool:
        """Return whether it is over."""

    def failure(self) -> tuple[int, int, int, int] | None:
        """Return what failed (see ``Failure``), once it is over."""


class Move:
    """A read or write under way: the ``Transfer`` of ``powertrain.roles.files``."""

    __slots__ = ("_length", "_moving", "_offset", "_owner", "_paths", "_writes", "told")

    def __init__(
        self, moving: Moving, owner: Owner, paths: tuple[str, ...], writes: bool, offset: int, length: int
    ) -> None:
        self._moving = moving
        self._owner = owner
        self._paths = paths
        self._writes = writes
        self._offset = offset
        self._length = length
        self.told = False
        """Whether someone has got its error."""

    def wait(self) -> None:
        """Return when every byte has been moved. Ctrl-C ends the wait, not the transfer.

        Raises:
            TransferFailed: it failed, or came out short.
        """
        self._owner.check()
        self._moving.wait()
        if (failure := self._moving.failure()) is not None:
            self.told = True
            found = Failure(*failure)
            raise transfer_failed(found, self._paths[found.part], self._writes, self._offset, self._length)

    def done(self) -> bool:
        """Return whether ``wait`` would return, or raise, at once."""
        self._owner.check()
        return self._moving.done()

    def settled(self) -> bool:
        """Return whether nobody needs to hear of it any more."""
        return self._moving.done() and (self.told or self._moving.failure() is None)
