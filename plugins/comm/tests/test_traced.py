"""What the tracer counts: calls, and the bytes that a rank must send."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from powertrain.mesh import Mesh
from powertrain.roles.communicator import Collective, SingleProcess, Traffic, WrappedCommunicator
from powertrain.testing.communicator import CommunicatorContract
from powertrain.testing.loopback import LoopbackWorld
from powertrain.testing.null import NullCommunicator
from powertrain_comm.config import CommConfig
from powertrain_comm.plugin import CommPlugin
from powertrain_comm.traced import ROWS, TracedCommunicator


class TestTraced(CommunicatorContract):
    """A traced communicator does what the one inside does."""

    def on_ranks(self, n, check, *args, sizes=None):
        return LoopbackWorld(n, sizes).run(lambda inner: check(TracedCommunicator(inner), *args))


def traced(rank=1, world=4):
    return TracedCommunicator(NullCommunicator(Mesh.build(world, rank), torch.device("cpu")))


def counted(comm):
    return {(t.operation, t.dimension): (t.calls, t.bytes) for t in comm.traffic()}


def test_each_operation_counts_what_it_must_send():
    """The bytes of every operation are its algorithmic minimum for this rank, in the element size of its tensor."""
    comm = traced()
    small, large = torch.zeros(10, dtype=torch.bfloat16), torch.zeros(40, dtype=torch.bfloat16)
    comm.all_gather(large, small)
    comm.reduce_scatter(small, large)
    comm.all_reduce(large)
    comm.all_reduce(torch.zeros(1, dtype=torch.uint8), "world")
    comm.all_to_all(large, large)
    comm.send(small, 0, "data")
    comm.receive(small, 0, "data")
    comm.broadcast(small, 1)
    comm.broadcast(small, 2)
    comm.barrier()
    assert counted(comm) == {
        ("all_gather", "data"): (1, 3 * 20),
        ("reduce_scatter", "data"): (1, 60),
        ("all_reduce", "data"): (1, 120),
        ("all_reduce", "world"): (1, 1),
        ("all_to_all", "data"): (1, 60),
        ("send", "data"): (1, 20),
        ("receive", "data"): (1, 0),
        ("broadcast", "data"): (2, 20),
        ("barrier", "world"): (1, 0),
    }
    assert comm.traffic()[0] == Traffic(operation="all_gather", dimension="data", calls=1, bytes=60)


def test_uneven_exchanges_leave_out_the_own_piece():
    """Of an uneven all_to_all, the rows that stay here are not counted; of nothing, nothing is."""
    comm = traced(rank=2)
    rows = torch.zeros(10, 3)
    comm.all_to_all(rows, rows, input_splits=[1, 2, 3, 4], output_splits=[1, 2, 3, 4])
    comm.all_to_all(rows[:0], rows[:0], input_splits=[0] * 4, output_splits=[0] * 4)
    assert counted(comm) == {("all_to_all", "data"): (2, 7 * 3 * 4)}


def test_derived_dimensions_count_apart():
    """Traffic within and across groups is told apart, each by its own number of ranks; along one rank nothing goes."""
    comm = traced()
    within, across = comm.split("data", 2)
    piece, both = torch.zeros(4), torch.zeros(8)
    comm.issue_together(
        [
            Collective(operation="all_gather", dimension=within, input=piece, output=both),
            Collective(operation="all_reduce", dimension=across, input=both, output=both),
        ]
    )
    comm.all_reduce(both, "tensor")
    assert counted(comm) == {
        ("all_gather", within): (1, 16),
        ("all_reduce", across): (1, 32),
        ("all_reduce", "tensor"): (1, 0),
    }


def test_a_collective_that_did_not_start_is_not_counted():
    """What the communicator inside refuses was not sent."""
    comm = TracedCommunicator(SingleProcess(Mesh.build(1, 0), torch.device("cpu")))
    with pytest.raises(ValueError, match="nobody to send to"):
        comm.send(torch.zeros(1), 0, "data")
    comm.all_reduce(torch.zeros(100))
    assert comm.traffic() == [Traffic(operation="all_reduce", dimension="data", calls=1, bytes=0)]


def test_the_table_tells_labels_apart_by_their_first_word(caplog):
    """Rank 0 logs one line per operation, dimension and first word, once; other ranks, and idle ones, log nothing."""
    caplog.set_level(logging.INFO, "powertrain.comm")
    traced(rank=1).close()
    traced(rank=0).close()
    comm = traced(rank=0)
    for number in range(3):
        comm.all_reduce(torch.zeros(1_000_000), label=f"bucket {number}")
    comm.all_gather(torch.zeros(8), torch.zeros(2), label="layers.0.weight")
    comm.barrier()
    other = traced(rank=1)
    other.barrier()
    for each in (other, comm, comm):
        each.close()
    (record,) = caplog.records
    lines = [line.split() for line in record.getMessage().splitlines()]
    assert lines[1:] == [
        ["operation", "dimension", "label", "calls", "MB", "sent"],
        ["all_gather", "data", "layers", "1", "0.000"],
        ["all_reduce", "data", "bucket", "3", "18.000"],
        ["barrier", "world", "-", "1", "0.000"],
    ]


def test_new_labels_for_ever_cost_no_memory():
    """A run that labels every collective anew keeps a table of bounded length, and loses no count."""
    comm = traced()
    for number in range(2 * ROWS):
        comm.all_reduce(torch.zeros(2), label=f"step{number}")
    assert counted(comm) == {("all_reduce", "data"): (2 * ROWS, 2 * ROWS * 12)}
    assert len(comm.table().splitlines()) <= ROWS + 2


def test_wrappers_pass_the_counts_on():
    """A wrapper around the tracer gives its counts, and one around anything else gives none."""
    comm = traced()
    comm.barrier()
    assert WrappedCommunicator(comm).traffic() == comm.traffic() != []
    assert WrappedCommunicator(comm.inner).traffic() == []


def through_the_hooks(trace):
    from powertrain.environment import Rank

    class Host:
        def backends(self):
            return ("gloo",)

        def device(self, index):
            return torch.device("cpu")

    plugin = CommPlugin(CommConfig(trace=trace))
    rank = Rank.from_environment()
    comm = plugin.make_communicator(None, Host(), Mesh.build(rank.world_size, rank.index), rank, 20.0)
    comm = plugin.wrap_communicator(comm, 20.0)
    comm.split("data", 2)
    comm.all_reduce(torch.zeros(100)).wait()
    facts = comm.describe()
    traffic = comm.traffic()
    comm.close()
    return facts.get("watchdog"), facts.get("trace"), [(t.operation, t.calls, t.bytes) for t in traffic]


def test_the_table_switches_it_on(ranks):
    """``trace = true`` counts what callers issue, and nothing of the watchdog's own; without it nothing is counted."""
    assert ranks(2, through_the_hooks, True) == [("on", "on", [("all_reduce", 1, 400)])] * 2
    assert ranks(2, through_the_hooks, False) == [("on", None, [])] * 2


def test_one_rank_can_be_traced():
    """A world of one is traced where that is asked for, although it is not watched."""
    alone = SingleProcess(Mesh.build(1, 0), torch.device("cpu"))
    comm = CommPlugin(CommConfig(trace=True)).wrap_communicator(alone, 1.0)
    assert isinstance(comm, TracedCommunicator)
    assert comm.inner is alone


def test_counting_is_cheap():
    """Counting costs microseconds a collective: a hundred times less than the smallest exchange."""
    code = """
import time, torch
from powertrain.mesh import Mesh
from powertrain.roles.communicator import Collective
from powertrain.testing.null import NullCommunicator
from powertrain_comm.traced import TracedCommunicator
inner = NullCommunicator(Mesh.build(4, 1), torch.device("cpu"))
tensor = torch.zeros(16)
one = Collective(operation="all_reduce", dimension="data", input=tensor, output=tensor, label="bucket 3")
def cost(comm):
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            comm.issue(one)
        best = min(best, (time.perf_counter() - start) / 500)
    return best
print((cost(TracedCommunicator(inner)) - cost(inner)) * 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20.0
    print(done.stdout)
