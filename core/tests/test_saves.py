"""How the engine goes about a store: what it asks, when, and what it deletes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import powertrain
from powertrain.context import Context
from powertrain.hookspecs import hookimpl
from powertrain.plugin import NoConfig, Plugin
from powertrain.roles.checkpoint import CheckpointStore, Snapshot
from powertrain.testing.memory_store import MemoryStore, Shelf


class LateStore(MemoryStore):
    """Ends asynchronous saves only when told to, and records what it is asked."""

    def __init__(self, context: Context) -> None:
        super().__init__(Shelf(), context.communicator)
        self.calls: list[str] = []
        self._late: list[tuple[str, Snapshot]] = []

    def save(self, tag: str, snapshot: Snapshot, *, asynchronous: bool = False) -> None:
        self._finish()
        if asynchronous:
            self._late.append((tag, snapshot))
        else:
            super().save(tag, snapshot)

    def _finish(self) -> None:
        for tag, snapshot in self._late:
            super().save(tag, snapshot)
        self._late.clear()

    def wait(self) -> list[str]:
        self.calls.append("wait")
        self._finish()
        return super().wait()

    def abandon(self) -> None:
        self.calls.append("abandon")

    def close(self) -> None:
        self.calls.append("close")


class Keeper(Plugin[NoConfig]):
    """Makes the store, and hears what is saved."""

    name, api, support = "keeper", 1, "example"

    def __init__(self) -> None:
        super().__init__(NoConfig())
        self.saved: list[str] = []

    @hookimpl
    def make_checkpoint_store(self, uri: str, context: Context) -> CheckpointStore | None:
        self.store = LateStore(context)
        return self.store

    @hookimpl
    def on_checkpoint_saved(self, tag: str) -> None:
        self.saved.append(tag)


def start(keeper: Keeper, **table: Any) -> powertrain.Engine:
    config = {"checkpoint": {"directory": "shelf://", "asynchronous": True, **table}}
    return powertrain.initialize(torch.nn.Linear(2, 1), config, loss_fn=torch.nn.functional.mse_loss, plugins=[keeper])


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


def step(engine: powertrain.Engine) -> None:
    engine.train_step((torch.ones(1, 2), torch.ones(1, 1)))


def test_an_error_abandons_saves_and_waits_for_none(keeper: Keeper) -> None:
    """When an error ends the block, stores are told to give up; the engine does not wait for other ranks."""
    with pytest.raises(RuntimeError, match="my own"), start(keeper) as engine:
        step(engine)
        engine.save_checkpoint()
        raise RuntimeError("my own")
    assert keeper.store.calls == ["abandon", "close"]
    assert keeper.saved == []


def test_a_good_end_waits_for_saves(keeper: Keeper) -> None:
    """Leaving the block without an error waits for the asynchronous save and announces it."""
    with start(keeper) as engine:
        step(engine)
        engine.save_checkpoint()
        assert keeper.saved == []
    assert keeper.store.calls == ["wait", "close"]
    assert keeper.saved == ["step-00000001"]


def test_asynchronous_saves_are_pruned_when_complete(keeper: Keeper) -> None:
    """``keep_last`` holds after the last save, which became complete long after it was asked for."""
    with start(keeper, every=1, keep_last=2) as engine:
        for _ in range(4):
            step(engine)
    assert keeper.store.tags() == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tags_of_the_user_are_never_deleted(keeper: Keeper, asynchronous: bool) -> None:
    """``keep_last`` counts and deletes checkpoints of automatic names only."""
    with start(keeper, every=1, keep_last=1, asynchronous=asynchronous) as engine:
        step(engine)
        engine.save_checkpoint(tag="mine")
        engine.save_checkpoint(tag="step-1-best")
        step(engine)
        step(engine)
    assert keeper.store.tags() == ["mine", "step-1-best", "step-00000003"]


def test_a_save_that_ends_in_a_load_is_announced(keeper: Keeper) -> None:
    """``load_checkpoint`` waits for the save under way, and its end is told as any other."""
    with start(keeper) as engine:
        step(engine)
        engine.save_checkpoint(tag="mine")
        engine.load_checkpoint()
        assert keeper.saved == ["mine"]
