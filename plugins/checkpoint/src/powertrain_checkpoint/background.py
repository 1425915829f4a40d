"""The one thread that writes beside training, and what became of its work."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class Background:
    """Runs one save at a time in a thread of its own and keeps its failure until asked.

    The thread is a daemon: a failed process does not wait for it. Call ``join``
    before the process ends.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failures: deque[Exception] = deque()

    def start(self, tag: str, work: Callable[[], None]) -> None:
        """Run ``work``, which saves ``tag``; the one before must have been joined."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._failures.append(error)

        self._thread = threading.Thread(target=run, name=f"checkpoint {tag}", daemon=True)
        self._thread.start()

    def fail(self, error: Exception) -> None:
        """Count a save as failed before it could start."""
        self._failures.append(error)

    def ended(self) -> bool:
        """Return whether nothing is under way."""
        return self._thread is None or not self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the work under way, at most ``seconds``; what takes longer is left to itself.

        Raises:
            TimeoutError: it takes longer.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(seconds)
            if thread.is_alive():
                raise TimeoutError(f"{thread.name} was not finished in {seconds} s")

    def check(self) -> None:
        """Raise what failed since the last call, once."""
        if self._failures:
            raise self._failures.popleft()
