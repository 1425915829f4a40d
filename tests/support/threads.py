"""Ranks as threads of the test's own process, which start at once and tell of the first collective that differs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import attrs
import pytest
import torch

from powertrain import Plugin, hookimpl
from powertrain.environment import Rank
from powertrain.errors import CollectiveDiverged
from powertrain.roles.communicator import Collective, Communicator, Handle
from powertrain.testing.loopback import LoopbackWorld

BUILDING = threading.Lock()
"""Held while a model is made: threads share torch's random numbers."""

_here = threading.local()


@attrs.frozen
class LoopbackConfig:
    """No settings."""


class Loopback(Plugin[LoopbackConfig]):
    """Connects the threads."""

    name, api = "loopback", 1

    @hookimpl
    def make_communicator(self) -> Communicator:
        communicator: Communicator = _here.communicator
        return communicator


class StrictWorld(LoopbackWorld):
    """Refuses collectives that are of one kind and mean different things."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(size, **options)
        self._labels: dict[Hashable, str] = {}

    def come(self, key: Hashable, members: Sequence[int], rank: int, collective: Collective) -> Handle:
        """Add one rank to a meeting, for the same purpose as the others."""
        label = self._labels.setdefault(key, collective.label)
        if label != collective.label:
            raise CollectiveDiverged(f"rank {rank} is at {collective.label!r}, another at {label!r}", where=str(key))
        return super().come(key, members, rank, collective)


def plugins() -> list[Plugin[Any]]:
    """Return what ``powertrain.initialize`` needs in a thread; nothing in a process of its own."""
    return [Loopback(LoopbackConfig())] if hasattr(_here, "communicator") else []


def run(n: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
    """Run ``function(*args, **kwargs)`` on ``n`` ranks; return their results, by rank."""

    def body(communicator: Communicator) -> Any:
        _here.communicator = communicator
        _here.rank = Rank(index=communicator.rank, world_size=n, local_index=communicator.rank, local_size=n)
        return function(*args, **kwargs)

    count = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rank, "from_environment", classmethod(lambda cls, environ=None: _here.rank))
        patch.setenv("POWERTRAIN_PLUGINS", "cpu,zero,checkpoint")
        torch.set_num_threads(1)
        try:
            return StrictWorld(n, timeout=60.0).run(body)
        finally:
            torch.set_num_threads(count)
