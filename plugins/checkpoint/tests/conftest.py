"""Ranks as threads of one process, each with its end of a loopback world."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from powertrain.roles.communicator import Collective, Communicator, Handle, WrappedCommunicator
from powertrain.testing.loopback import LoopbackWorld


class OneThread(WrappedCommunicator):
    """Refuses collectives from any thread but the one that trains; counts the others."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.owner = threading.get_ident()
        self.issued = 0

    def issue(self, collective: Collective) -> Handle:
        assert threading.get_ident() == self.owner, "a collective left the training thread"
        self.issued += 1
        return super().issue(collective)


Work = Callable[[OneThread], Any]


def run(world_size: int, work: Work) -> list[Any]:
    """Run ``work`` on every rank; return each rank's result, or the exception that it raised."""

    def attempt(communicator: Communicator) -> Any:
        try:
            return work(OneThread(communicator))
        except Exception as error:
            return error

    return LoopbackWorld(world_size).run(attempt)


@pytest.fixture(scope="session")
def outcomes() -> Callable[[int, Work], list[Any]]:
    """Run a function on several ranks and return each rank's result or exception."""
    return run


@pytest.fixture(scope="session")
def on_ranks() -> Callable[[int, Work], list[Any]]:
    """Run a function on several ranks and return their results; an exception on any rank fails the test."""

    def checked(world_size: int, work: Work) -> list[Any]:
        results = run(world_size, work)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    return checked
