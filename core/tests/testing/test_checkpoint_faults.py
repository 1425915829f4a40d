"""Checkpoint stores with one fault each: the contract must catch every one."""

from __future__ import annotations

import attrs
import pytest
import torch

from powertrain.testing.checkpoint import CheckpointStoreContract
from powertrain.testing.memory_store import MemoryReader, MemoryStore, Shelf


class Spoilt(MemoryStore):
    """Spoils a snapshot on its way in."""

    def save(self, tag, snapshot, *, asynchronous=False):
        tensors = [self.spoil(piece) for piece in snapshot.tensors]
        super().save(tag, attrs.evolve(snapshot, tensors=tensors), asynchronous=asynchronous)


class SavesOffByOne(Spoilt):
    def spoil(self, piece):
        return attrs.evolve(piece, tensor=piece.tensor.roll(1)) if piece.start else piece


class DropsTheType(Spoilt):
    def spoil(self, piece):
        return attrs.evolve(piece, tensor=piece.tensor.float())


class RoundsToHalf(Spoilt):
    def spoil(self, piece):
        half = piece.tensor.to(torch.bfloat16) if piece.tensor.dtype == torch.float64 else piece.tensor
        return attrs.evolve(piece, tensor=half.to(piece.tensor.dtype) + (half.dtype != piece.tensor.dtype))


class IgnoresTheBlock(Spoilt):
    def spoil(self, piece):
        return attrs.evolve(piece, block=None)


class ReadsOffByOne(MemoryStore):
    def open(self, tag=None):
        inner = super().open(tag)

        class Reader(MemoryReader):
            def __init__(self):
                self.__dict__.update(inner.__dict__)

            def read(self, slices):
                super().read([attrs.evolve(s, start=max(0, s.start - 1)) for s in slices])

        return Reader()


class VisibleBeforeComplete(MemoryStore):
    def save(self, tag, snapshot, *, asynchronous=False):
        self._shelf.complete.setdefault(tag, None)
        super().save(tag, snapshot, asynchronous=asynchronous)


class KeepsAFailedSave(MemoryStore):
    def save(self, tag, snapshot, *, asynchronous=False):
        try:
            super().save(tag, snapshot, asynchronous=asynchronous)
        except Exception:
            self._shelf.complete[tag] = None
            raise


class SavesWithoutACopy(MemoryStore):
    later = None

    def save(self, tag, snapshot, *, asynchronous=False):
        if asynchronous:
            self.later = tag, snapshot
        else:
            super().save(tag, snapshot)

    def wait(self):
        if self.later is not None:
            super().save(*self.later)
            self.later = None
        return super().wait()


class SortsTags(MemoryStore):
    def tags(self):
        return sorted(super().tags())


class OpensTheOldest(MemoryStore):
    def open(self, tag=None):
        return super().open(tag or next(iter(self.tags()), None))


class OpensSomethingElse(MemoryStore):
    def open(self, tag=None):
        return super().open(tag if tag in self.tags() else None)


class PrunesTheNewest(MemoryStore):
    def prune(self, keep):
        self._communicator.barrier().wait()
        if self._communicator.rank == 0:
            for tag in self.tags()[keep:]:
                del self._shelf.complete[tag]
        self._communicator.barrier().wait()


class KeepsOneRanksValues(MemoryStore):
    def open(self, tag=None):
        reader = super().open(tag)
        reader.rank_values = reader.rank_values[:1] * len(reader.rank_values)
        return reader


class AnnouncesTwice(MemoryStore):
    def poll(self):
        return list(self._news)


class LeavesUnknownTensorsAlone(MemoryStore):
    def open(self, tag=None):
        inner = super().open(tag)

        class Reader(MemoryReader):
            def __init__(self):
                self.__dict__.update(inner.__dict__)

            def read(self, slices):
                super().read([s for s in slices if s.name in self.whole])

        return Reader()


FAULTS = {
    SavesOffByOne: "test_loads_on_any_number_of_ranks",
    DropsTheType: "test_keeps_element_types",
    RoundsToHalf: "test_keeps_element_types",
    IgnoresTheBlock: "test_saves_blocks",
    ReadsOffByOne: "test_reads_any_part",
    VisibleBeforeComplete: "test_is_visible_only_when_whole",
    KeepsAFailedSave: "test_a_failed_save_is_not_visible",
    SavesWithoutACopy: "test_asynchronous_saves_take_a_copy",
    SortsTags: "test_tags_are_in_order",
    OpensTheOldest: "test_tags_are_in_order",
    OpensSomethingElse: "test_missing_checkpoints_are_an_error",
    PrunesTheNewest: "test_prunes_the_oldest",
    KeepsOneRanksValues: "test_lists_tensors_and_values",
    AnnouncesTwice: "test_asynchronous_saves_take_a_copy",
    LeavesUnknownTensorsAlone: "test_what_is_not_in_it_is_an_error",
}
"""Each fault, and the test that is there to catch it."""


def suite(store):
    class Suite(CheckpointStoreContract):
        keeps_files = False

        def __init__(self):
            self.shelves = {}

        def make(self, directory, communicator):
            return store(self.shelves.setdefault(directory, Shelf()), communicator)

    return Suite


def test_the_healthy_one_passes(contract):
    """A store without a fault fails no test."""
    assert contract.failures(suite(MemoryStore)) == []


@pytest.mark.parametrize(("fault", "test"), FAULTS.items())
def test_the_fault_is_caught(contract, fault, test):
    """A store with one fault fails the test that is there for it."""
    assert contract.failures(suite(fault), test), f"{test} passed"
