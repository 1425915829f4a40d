"""The core's own implementations, held to the contracts."""

from __future__ import annotations

import pytest

from powertrain.config import BatchSizes
from powertrain.replicated import ReplicatedOptimizer
from powertrain.sampling import EpochSampler
from powertrain.testing.checkpoint import CheckpointStoreContract
from powertrain.testing.memory_store import MemoryStore, Shelf
from powertrain.testing.optimizer import OptimizerWrapperContract
from powertrain.testing.sampler import SamplerContract


class TestEpochSampler(SamplerContract):
    """The core's sampler."""

    def make(self, length, total, index, size, seed):
        sizes = BatchSizes(micro=total // size, accumulation=1, total=total, origins={})
        return EpochSampler(length, sizes, index, size, seed)


class TestReplicatedOptimizer(OptimizerWrapperContract):
    """The core's optimizer wrapper."""

    low_precision = True

    def make(self, model, optimizer, context):
        return ReplicatedOptimizer(model, optimizer, context)


class TestMemoryStore(CheckpointStoreContract):
    """The store for tests."""

    keeps_files = False

    @pytest.fixture(autouse=True)
    def _shelves(self):
        self.shelves = {}

    def make(self, directory, communicator):
        return MemoryStore(self.shelves.setdefault(directory, Shelf()), communicator)
