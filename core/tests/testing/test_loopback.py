"""The loopback world, held to the communicator's contract, and the null stand-ins."""

from __future__ import annotations

import pytest
import torch

from powertrain.errors import CollectiveDiverged, CollectiveStalled, PeerFailed
from powertrain.mesh import Mesh
from powertrain.testing import collectives
from powertrain.testing.accelerator import AcceleratorContract
from powertrain.testing.communicator import CommunicatorContract, PooledCommunicatorContract
from powertrain.testing.loopback import LoopbackWorld
from powertrain.testing.null import NullAccelerator, NullCommunicator, NullHost


class TestLoopback(CommunicatorContract):
    """Threads of one process are ranks like any other."""

    def on_ranks(self, n, check, *args, sizes=None):
        return LoopbackWorld(n, sizes).run(check, *args)


class TestNullHost(AcceleratorContract):
    """The null accelerator on the host computes and seeds as an accelerator does."""

    counts_memory = False

    def make(self):
        return NullHost()


def alone(sizes):
    return LoopbackWorld(1, sizes).communicators[0]


class Pooled(PooledCommunicatorContract):
    factory = staticmethod(alone)


def test_the_pooled_contract_finds_a_factory(ranks):
    """A factory in a test module is found and called by the processes of the pool."""
    contract = Pooled()
    contract._pool = ranks
    assert contract.on_ranks(2, collectives.place) == [(0, 1, 0, 1)] * 2
    contract.on_ranks(1, collectives.all_reduce_reduces)


def test_a_missing_rank_is_a_stall():
    """Waiting for a rank that never comes ends with an error that names it."""
    world = LoopbackWorld(3, timeout=0.05)
    handles = [world.communicators[rank].barrier() for rank in (0, 1)]
    assert not handles[0].done()
    with pytest.raises(CollectiveStalled, match="rank 2"):
        handles[0].wait()


def test_different_collectives_are_an_error():
    """Ranks that mean different things are told so, all of them."""
    world = LoopbackWorld(2)
    first = world.communicators[0].all_reduce(torch.zeros(3))
    second = world.communicators[1].all_reduce(torch.zeros(4))
    for handle in (first, second):
        with pytest.raises(CollectiveDiverged, match="different collectives"):
            handle.wait()


def test_an_error_on_one_rank_ends_the_others():
    """A rank that waits for one that has failed gets PeerFailed; the caller gets the first error."""
    seen = []

    def body(communicator):
        if communicator.rank == 1:
            raise KeyError("first")
        try:
            communicator.all_reduce(torch.zeros(1)).wait()
        except PeerFailed as error:
            seen.append(error.found)
            raise

    with pytest.raises(KeyError, match="first"):
        LoopbackWorld(2).run(body)
    assert seen == ["KeyError: 'first'"]


def test_one_thread_can_play_all_ranks():
    """A thousand ranks reduce in one thread: each issues before any waits."""
    world = LoopbackWorld(1024, {"tensor": 8})
    tensors = [torch.tensor([rank]) for rank in range(1024)]
    handles = [c.all_reduce(t, "tensor") for c, t in zip(world.communicators, tensors, strict=True)]
    for handle in handles:
        handle.wait()
    assert [t.item() for t in tensors[8:16]] == [sum(range(8, 16))] * 8


def test_null_stand_ins_record_and_do_nothing():
    """The null accelerator's tensors hold no memory; the null communicator notes what it was asked."""
    accelerator = NullAccelerator()
    device = accelerator.device(700)
    huge = torch.empty(2**40, device=device)
    communicator = NullCommunicator(Mesh.build(1024, 700, {"tensor": 8}), device)
    communicator.all_reduce(huge, "tensor", label="huge").wait()
    assert [(c.operation, c.dimension, c.label) for c in communicator.issued] == [("all_reduce", "tensor", "huge")]
    assert communicator.size("data") == 128
    assert accelerator.calls == ["device"]
