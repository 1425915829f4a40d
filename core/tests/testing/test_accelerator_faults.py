"""Accelerators with one fault each: the contract must catch every one."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from powertrain.roles.accelerator import Memory
from powertrain.testing.accelerator import AcceleratorContract
from powertrain.testing.null import NullHost

STATM = Path("/proc/self/statm")
TOTAL = 2**40


class Host(NullHost):
    """The host with an account of its memory: resident now, and the most since the last reset."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def memory(self, device):
        used = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.largest = max(self.largest, used)
        return Memory(used=used, peak=self.largest, total=TOTAL, free=TOTAL - used)

    def reset_peak_memory(self, device):
        self.largest = 0

    def release_unused(self, device):
        # Another test of this process may have told the C library to keep what is freed.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class ForgetsToRestore(Host):
    def set_rng_state(self, state, device):
        pass


class RestoresTheSeedOnly(Host):
    def set_rng_state(self, state, device):
        torch.default_generator.manual_seed(3)


class IgnoresTheSeed(Host):
    def seed(self, value, device):
        torch.default_generator.manual_seed(0)


class NeverResetsThePeak(Host):
    def reset_peak_memory(self, device):
        pass


class ReportsNoMemory(Host):
    def memory(self, device):
        return Memory(used=10, peak=10, total=TOTAL, free=TOTAL)


class CountsInMegabytes(Host):
    def memory(self, device):
        memory = super().memory(device)
        return Memory(used=memory.used >> 20, peak=memory.peak >> 20, total=TOTAL, free=TOTAL)


class AcceptsAnyDevice(Host):
    def device(self, index):
        return torch.device("cpu")


class GivesOutOneDeviceTooMany(Host):
    def device_count(self):
        return 2

    def device(self, index):
        return super().device(index)


class PromisesATypeItCannotTrain(Host):
    def dtypes(self):
        return super().dtypes() | {torch.float8_e4m3fn}


class InventsACapability(Host):
    @property
    def capabilities(self):
        return frozenset({"teleport"})


class MisnamesItsDevice(Host):
    device_type = "cuda"

    def device(self, index):
        super().device(index)
        return torch.device("cpu")


FAULTS = {
    ForgetsToRestore: "test_random_state_continues",
    RestoresTheSeedOnly: "test_random_state_continues",
    IgnoresTheSeed: "test_equal_seeds_give_equal_numbers",
    NeverResetsThePeak: "test_peak_memory_starts_anew",
    ReportsNoMemory: "test_memory_follows_tensors",
    CountsInMegabytes: "test_memory_follows_tensors",
    AcceptsAnyDevice: "test_refuses_devices_that_are_not_there",
    GivesOutOneDeviceTooMany: "test_refuses_devices_that_are_not_there",
    PromisesATypeItCannotTrain: "test_trains_in_every_type",
    InventsACapability: "test_capabilities_are_known",
    MisnamesItsDevice: "test_names_itself",
}
"""Each fault, and the test that is there to catch it."""

pytestmark = pytest.mark.skipif(not STATM.exists(), reason="counts memory through /proc")


def suite(accelerator):
    class Suite(AcceleratorContract):
        def make(self):
            return accelerator()

    return Suite


def test_the_healthy_one_passes(contract):
    """An accelerator without a fault fails no test."""
    assert contract.failures(suite(Host)) == []


@pytest.mark.parametrize(("fault", "test"), FAULTS.items())
def test_the_fault_is_caught(contract, fault, test):
    """An accelerator with one fault fails the test that is there for it."""
    assert contract.failures(suite(fault), test), f"{test} passed"
