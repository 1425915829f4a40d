"""Threads of Python's for transfers; unlike those of ``concurrent.futures``, they do not hold up the process's end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from powertrain_offload.io.owner import Owner


class Crew:
    """Some threads that take one task after the other."""

    def __init__(self, threads: int) -> None:
        self._owner = Owner()
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks,), name=f"powertrain-offload-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def over(self) -> bool:
        """Return whether nothing new is to begin."""
        return self._over.is_set()

    def submit(self, task: Callable[[], None]) -> None:
        """Have a thread run ``task`` when those before have been taken; once it is over, run it here."""
        with self._lock:
            if not self._over.is_set():
                self._tasks.put(task)
                return
        task()

    def stop(self) -> None:
        """Return when the threads have ended; tasks still run, and see that it is over."""
        if self._over.is_set() or not self._owner.here():
            return
        with self._lock:
            self._over.set()
            for _ in self._threads:
                self._tasks.put(None)
        for thread in self._threads:
            thread.join()


def _work(tasks: SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # it holds memory
