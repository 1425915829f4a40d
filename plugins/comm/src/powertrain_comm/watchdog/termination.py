"""Notices SIGTERM even while the main thread is in native code.

When one rank dies, its launcher ends the others at once, often before the
watchdog could say why. Python runs signal handlers in the main thread only,
between two of its instructions; but the interpreter's C handler writes the
signal's number to a file descriptor right away, which any thread may read.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType


class Termination:
    """Takes SIGTERM over from the default action, if nobody else has, until it is closed."""

    def __init__(self) -> None:
        self._asked = False
        self._pipe: tuple[int, int] | None = None
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may install handlers
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            return
        reader, writer = os.pipe()
        for end in (reader, writer):
            os.set_blocking(end, False)
        previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if previous != -1:  # an event loop listens there
            signal.set_wakeup_fd(previous)
            os.close(reader)
            os.close(writer)
            return
        self._pipe = reader, writer
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    @property
    def asked(self) -> bool:
        """Whether the process was asked to end, and nobody but this object knows."""
        if self._pipe is None or signal.getsignal(signal.SIGTERM) != self._note:
            return False
        with contextlib.suppress(BlockingIOError):
            self._asked |= signal.SIGTERM in os.read(self._pipe[0], 64)
        return self._asked

    def close(self) -> None:
        """Give SIGTERM back, unless somebody else has taken it meanwhile."""
        if self._pipe is None or threading.current_thread() is not threading.main_thread():
            return
        reader, writer = self._pipe
        if signal.getsignal(signal.SIGTERM) == self._note:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        current = signal.set_wakeup_fd(-1)
        if current not in (-1, writer):
            signal.set_wakeup_fd(current)
        self._pipe = None
        os.close(reader)
        os.close(writer)
