"""Notices exceptions that end the process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType


class ExceptHook:
    """A link in the chain of ``sys.excepthook``, which can be taken out again.

    Args:
        tell: called with the exception, after the hook before has printed it.
    """

    def __init__(self, tell: Callable[[BaseException], None]) -> None:
        self._tell = tell
        self.previous = sys.excepthook
        sys.excepthook = self

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        """Let the hook before print, then tell."""
        self.previous(kind, error, traceback)
        self._tell(error)

    def remove(self) -> None:
        """Take this link out, wherever in the chain it is by now."""
        if sys.excepthook is self:
            sys.excepthook = self.previous
            return
        link = sys.excepthook
        while isinstance(link, ExceptHook):
            if link.previous is self:
                link.previous = self.previous
                return
            link = link.previous
