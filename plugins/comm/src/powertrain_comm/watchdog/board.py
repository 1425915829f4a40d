"""The store in which ranks leave notes for one another, beside their collectives."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from powertrain.environment import Rank
from powertrain.roles.communicator import Communicator

HOST = 0
"""The rank that hosts the store."""

REACH = timedelta(seconds=30)
"""How long a client tries to connect."""

PAUSE = 0.05
"""Seconds between two looks at a note that is awaited."""


class BoardLost(Exception):
    """The rank that hosts the store is gone."""


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
        raise BoardLost(str(error)) from error


class Board:
    """One connection to the store; each thread has its own.

    Args:
        store: the connection.
        server: the store itself, where this rank hosts it; it lives as long as this object.
    """

    def __init__(self, store: TCPStore, server: TCPStore | None = None) -> None:
        self._store = store
        self._server = server

    def write(self, key: str, value: Any = True) -> None:
        """Leave a note."""
        with _reached():
            self._store.set(key, json.dumps(value))

    def read(self, key: str) -> Any:
        """Return a note, or None if there is none; never waits."""
        with _reached():
            return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def await_note(self, key: str) -> Any:
        """Return a note as soon as it is there."""
        with _reached():
            return json.loads(self._store.get(key))

    def erase(self, key: str) -> None:
        """Take a note away."""
        with _reached():
            self._store.delete_key(key)

    def read_all(self, kind: str, ranks: Sequence[int]) -> dict[int, Any]:
        """Return the notes ``kind/<rank>`` that are there."""
        notes = {rank: self.read(f"{kind}/{rank}") for rank in ranks}
        return {rank: note for rank, note in notes.items() if note is not None}

    def count(self, key: str, add: int = 0) -> int:
        """Return a counter, after adding to it."""
        with _reached():
            return int(self._store.add(key, add))

    def first(self, key: str, value: Any) -> tuple[bool, Any]:
        """Write a note that only one rank can write; return whether it was this one, and the note."""
        with _reached():
            won = self._store.add(f"{key}/claims", 1) == 1
            if won:
                self._store.set(key, json.dumps(value))
        return won, value if won else self.await_note(key)

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for ``condition``, at most ``seconds``; return whether it came."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(PAUSE)
        return True


def open_boards(communicator: Communicator, timeout: float, note: str) -> tuple[Board, Board, list[str]]:
    """Host or reach the store; return a connection for this thread, one for another, and every rank's ``note``.

    Called on every rank. ``timeout`` (seconds) bounds the first one's waits for notes.
    """
    address = Rank.from_environment().address
    server = None
    if communicator.rank == HOST:
        server = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=REACH)
    gathered = communicator.gather_json([None if server is None else server.port, note], label="watchdog")
    mine, other = (TCPStore(address, gathered[HOST][0], wait_for_workers=False, timeout=REACH) for _ in range(2))
    mine.set_timeout(timedelta(seconds=timeout))
    return Board(mine, server), Board(other), [theirs for _, theirs in gathered]
