"""Ranks as threads of one process, connected by shared memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from powertrain.mesh import Mesh
from powertrain.roles.communicator import Collective, Communicator, Done, Handle


class ThreadCommunicator(Communicator):
    """One rank of several threads; knows the collectives that a store may use."""

    def __init__(self, rank: int, world_size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.mesh = Mesh.build(world_size, rank)
        self.device = torch.device("cpu")
        self.board, self.meet = board, barrier
        self.issued = 0
        self.thread = threading.current_thread()

    def issue(self, collective: Collective) -> Handle:
        assert threading.current_thread() is self.thread, "a collective left the main thread"
        self.issued += 1
        self.board[self.rank] = collective.input
        self.meet.wait(60)
        if collective.operation == "all_gather":
            collective.output.copy_(torch.cat([part.view(-1) for part in self.board]))
        else:
            assert collective.operation == "barrier"
        self.meet.wait(60)
        return Done()

    def close(self) -> None:
        pass


Outcome = Any


def run(world_size: int, work: Callable[[Communicator], Any]) -> list[Outcome]:
    """Run ``work`` on every rank; return each rank's result, or the exception that it raised."""
    board, barrier = [None] * world_size, threading.Barrier(world_size)

    def rank(index: int) -> Any:
        try:
            return work(ThreadCommunicator(index, world_size, board, barrier))
        except BaseException as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(rank, range(world_size)))


@pytest.fixture
def ranks() -> Callable[[int, Callable[[Communicator], Any]], list[Any]]:
    """Run a function on several ranks and return their results; an exception on any rank fails the test."""

    def checked(world_size: int, work: Callable[[Communicator], Any]) -> list[Any]:
        results = run(world_size, work)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    return checked


@pytest.fixture
def outcomes() -> Callable[[int, Callable[[Communicator], Any]], list[Any]]:
    """Run a function on several ranks and return each rank's result or exception."""
    return run
