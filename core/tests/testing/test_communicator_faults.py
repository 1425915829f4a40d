"""Communicators with one fault each: the contract must catch every one."""

from __future__ import annotations

import attrs
import pytest
import torch

from powertrain.roles.communicator import Done, WrappedCommunicator
from powertrain.testing.communicator import CommunicatorContract
from powertrain.testing.loopback import LoopbackWorld


class After:
    """A handle that does something to the result once it is there."""

    def __init__(self, handle, change):
        self.handle, self.change = handle, change

    def wait(self):
        self.handle.wait()
        change, self.change = self.change, lambda: None
        change()

    def done(self):
        return self.handle.done()


class Faulty(WrappedCommunicator):
    """Spoils one operation."""

    operation = ""

    def issue(self, collective):
        if collective.operation != self.operation:
            return super().issue(collective)
        return self.spoil(collective)

    def issue_together(self, collectives):
        return super(WrappedCommunicator, self).issue_together(collectives)

    def changed(self, collective, **changes):
        return self.inner.issue(attrs.evolve(collective, **changes))


class LosesTheWait(Faulty):
    def issue(self, collective):
        self.inner.issue(collective)
        return Done()


class ScattersOffByOne(Faulty):
    operation = "reduce_scatter"

    def spoil(self, collective):
        return self.changed(collective, input=collective.input.roll(1))


class ScattersToTheNeighbour(Faulty):
    operation = "reduce_scatter"

    def spoil(self, collective):
        return self.changed(collective, input=collective.input.roll(collective.output.numel()))


class MeansASum(Faulty):
    operation = "all_reduce"

    def spoil(self, collective):
        reduction = "sum" if collective.reduction == "mean" else collective.reduction
        return self.changed(collective, reduction=reduction)


class SumsAMeanWhenScattering(Faulty):
    operation = "reduce_scatter"

    def spoil(self, collective):
        return self.changed(collective, reduction="mean")


class GathersInReverse(Faulty):
    operation = "all_gather"

    def spoil(self, collective):
        pieces = collective.output.view(self.size(collective.dimension), -1)
        return After(self.inner.issue(collective), lambda: pieces.copy_(pieces.flip(0).clone()))


class ReducesInHalf(Faulty):
    operation = "all_reduce"

    def spoil(self, collective):
        half = collective.input.to(torch.bfloat16) if collective.input.is_floating_point() else collective.input
        handle = self.changed(collective, input=half, output=half)
        return After(handle, lambda: collective.output.copy_(half))


class TakesMaximumForMinimum(Faulty):
    operation = "all_reduce"

    def spoil(self, collective):
        return self.changed(collective, reduction="max" if collective.reduction == "min" else collective.reduction)


class BroadcastsFromZero(Faulty):
    operation = "broadcast"

    def spoil(self, collective):
        return self.changed(collective, peer=0)


class ForgetsTheSplits(Faulty):
    operation = "all_to_all"

    def spoil(self, collective):
        return self.changed(collective, input_splits=None, output_splits=None)


class PassesTheBarrier(Faulty):
    operation = "barrier"

    def spoil(self, collective):
        return Done()


class SpoilsItsInput(Faulty):
    operation = "reduce_scatter"

    def spoil(self, collective):
        return After(self.inner.issue(collective), lambda: collective.input.zero_())


class ReducesOverTheWorld(Faulty):
    operation = "all_reduce"

    def spoil(self, collective):
        return self.changed(collective, dimension="world")


class ForgetsTheLastOfSeveral(Faulty):
    def issue_together(self, collectives):
        return super().issue_together(collectives[:-1])


class AllocatesAnotherType(Faulty):
    def empty(self, numel, dtype, dimension="data"):
        return super().empty(numel, torch.float32, dimension)


class SendsTheFirstTwice(Faulty):
    operation = "send"
    kept = None

    def spoil(self, collective):
        self.kept = collective.input.clone() if self.kept is None else self.kept
        return self.changed(collective, input=self.kept)


class DropsTheEnd(Faulty):
    operation = "all_reduce"

    def spoil(self, collective):
        flat = collective.output.view(-1)
        kept = flat[2**20 :].clone()
        return After(self.inner.issue(collective), lambda: flat[2**20 :].copy_(kept))


class SplitsOffStrides(Faulty):
    """Takes every n-th rank for a neighbour."""

    def split(self, dimension, size):
        return self.inner.split(dimension, size)[::-1]


class SplitsUnevenly(Faulty):
    def split(self, dimension, size):
        return f"{dimension}.within{size}", f"{dimension}.across{size}"

    def size(self, dimension):
        return 1 if dimension.endswith("3") else super().size(dimension)


class ReducesOverTheParent(Faulty):
    operation = "all_reduce"

    def spoil(self, collective):
        return self.changed(collective, dimension=collective.dimension.partition(".")[0])


class GathersWithoutTheOwn(Faulty):
    """Clears the output before it reads the input."""

    operation = "all_gather"

    def spoil(self, collective):
        if collective.input.data_ptr() != collective.output.data_ptr():
            return self.inner.issue(collective)
        collective.output.zero_()
        return self.inner.issue(collective)


FAULTS = {
    SplitsOffStrides: "test_splits_a_dimension",
    SplitsUnevenly: "test_splits_a_dimension",
    ReducesOverTheParent: "test_splits_on_a_mesh",
    GathersWithoutTheOwn: "test_works_in_place",
    LosesTheWait: "test_wait_returns_with_the_result",
    ScattersOffByOne: "test_reduce_scatter_gives_each_its_piece",
    ScattersToTheNeighbour: "test_reduce_scatter_gives_each_its_piece",
    MeansASum: "test_all_reduce_other_reductions",
    SumsAMeanWhenScattering: "test_gather_undoes_scatter",
    GathersInReverse: "test_all_gather_keeps_the_order",
    ReducesInHalf: "test_all_reduce_keeps_digits",
    TakesMaximumForMinimum: "test_all_reduce_other_reductions",
    BroadcastsFromZero: "test_broadcast_copies",
    ForgetsTheSplits: "test_all_to_all_with_uneven_pieces",
    PassesTheBarrier: "test_barrier_waits_for_all",
    SpoilsItsInput: "test_reduce_scatter_gives_each_its_piece",
    ReducesOverTheWorld: "test_dimensions_are_separate",
    ForgetsTheLastOfSeveral: "test_together_is_as_one_by_one",
    AllocatesAnotherType: "test_allocates",
    SendsTheFirstTwice: "test_send_and_receive",
    DropsTheEnd: "test_large_tensors",
}
"""Each fault, and the test that is there to catch it."""


def suite(wrapper):
    class Suite(CommunicatorContract):
        world_sizes = (2, 3)

        def on_ranks(self, n, check, *args, sizes=None):
            return LoopbackWorld(n, sizes, timeout=2.0).run(lambda inner: check(wrapper(inner), *args))

    return Suite


def test_the_healthy_one_passes(contract):
    """A wrapper without a fault fails no test."""
    assert contract.failures(suite(Faulty)) == []


@pytest.mark.parametrize(("fault", "test"), FAULTS.items())
def test_the_fault_is_caught(contract, fault, test):
    """A communicator with one fault fails the test that is there for it."""
    assert contract.failures(suite(fault), test), f"{test} passed"
