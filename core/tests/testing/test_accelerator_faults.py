"""Accelerators with one fault each: the contract must catch every one."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import attrs
import pytest
import torch

from powertrain import kernels
from powertrain.kernels.updates import Operands
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


class OffersTheReferences(Host):
    """One with every kernel, all of them right."""

    @property
    def capabilities(self):
        return frozenset({"kernels"})

    def kernel(self, name):
        return kernels.reference(name) if name in kernels.NAMES else None


class HasOneWrongKernel(OffersTheReferences):
    """One whose kernel ``wrong`` is off by a thousandth in one place: an element that it writes or returns."""

    wrong = ""

    def kernel(self, name):
        own = super().kernel(name)
        return (lambda *arguments, **options: _spoilt(own, arguments, options)) if name == self.wrong else own


def _spoilt(own, arguments, options):
    """Call a kernel and change the last element of what it returned, or of what it should have written."""
    result = own(*arguments, **options)
    if isinstance(result, tuple):
        return (*result[:-1], result[-1] * 1.001)
    if result is not None:
        return result * 1.001
    first = arguments[0]
    if isinstance(first, Operands):
        first.params[-1][-1] += 1e-3
    else:  # combine writes its first argument, quantize its second, dequantize its third
        place = next(t for t in (*arguments[2:3], *arguments[1:2], first) if isinstance(t, torch.Tensor))
        place.view(-1)[-1] += 1e-3
    return result


class IgnoresTheScale(OffersTheReferences):
    def kernel(self, name):
        own = super().kernel(name)
        return (lambda operands, *, scale, **numbers: own(operands, **numbers)) if name == "adam" else own


class ForgetsTheCopies(OffersTheReferences):
    def kernel(self, name):
        own = super().kernel(name)
        return (lambda operands, **numbers: own(attrs.evolve(operands, outs=()), **numbers)) if name == "lion" else own


class WritesIntoGradients(OffersTheReferences):
    def kernel(self, name):
        own = super().kernel(name)

        def momentum(operands, *, scale, **numbers):
            for grad in operands.grads:
                grad.mul_(scale)
            own(operands, **numbers)

        return momentum if name == "momentum" else own


class HidesItsKernels(OffersTheReferences):
    @property
    def capabilities(self):
        return frozenset()


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
    IgnoresTheScale: "test_kernels_agree_with_their_references",
    ForgetsTheCopies: "test_kernels_agree_with_their_references",
    WritesIntoGradients: "test_kernels_agree_with_their_references",
    HidesItsKernels: "test_kernels_agree_with_their_references",
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


@pytest.mark.parametrize("name", sorted(kernels.NAMES))
def test_each_kernel_that_is_off_is_caught(contract, name):
    """With one wrong kernel among right ones, the case of that kernel fails, and no other."""
    fault = type("Fault", (HasOneWrongKernel,), {"wrong": name})
    ((_, error),) = contract.failures(suite(fault), "test_kernels_agree_with_their_references")
    assert str(error).startswith(f"{name}: tensor ")


def test_right_kernels_pass(contract):
    """An accelerator whose kernels are the references fails no test."""
    assert contract.failures(suite(OffersTheReferences), "test_kernels_agree_with_their_references") == []
