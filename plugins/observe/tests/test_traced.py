"""What the tracer counts: calls, and the bytes that a rank must send."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import powertrain
from powertrain.mesh import Mesh
from powertrain.roles.communicator import Collective, Handles, SingleProcess, Traffic, WrappedCommunicator
from powertrain.testing.communicator import CommunicatorContract
from powertrain.testing.loopback import LoopbackWorld
from powertrain.testing.null import NullCommunicator
from powertrain_observe import comm_table
from powertrain_observe.clock import DeviceClock, DeviceTimed, HostTimed
from powertrain_observe.config import ObserveConfig
from powertrain_observe.plugin import ObservePlugin
from powertrain_observe.traced import ROWS, Row, TracedCommunicator, kind_of


class TestTraced(CommunicatorContract):
    """A traced communicator does what the one inside does."""

    def on_ranks(self, n, check, *args, sizes=None):
        return LoopbackWorld(n, sizes).run(lambda inner: check(TracedCommunicator(inner), *args))


def traced(rank=1, world=4):
    return TracedCommunicator(NullCommunicator(Mesh.build(world, rank), torch.device("cpu")))


def counted(comm):
    totals = {}
    for t in comm.traffic():
        calls, nbytes = totals.get((t.operation, t.dimension), (0, 0))
        totals[t.operation, t.dimension] = (calls + t.calls, nbytes + t.bytes)
    return totals


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
    first = comm.traffic()[0]
    assert (first.operation, first.dimension, first.calls, first.bytes) == ("all_gather", "data", 1, 60)


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


def test_the_table_tells_labels_apart_by_what_they_say_of_the_data(caplog):
    """Rank 0 logs one line per operation, dimension and kind of data, once; other ranks, and idle ones, log nothing."""
    caplog.set_level(logging.INFO, "powertrain.observe")
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
    assert lines[2:] == [
        ["all_gather", "data", "layers", "1", "0.000", "-", "-", "-", "-"],
        ["all_reduce", "data", "bucket", "3", "18.000", "-", "-", "-", "-"],
        ["barrier", "world", "-", "1", "0.000", "-", "-", "-", "-"],
    ]


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("gradients, bucket 0: 2.bias to 0.weight", "gradients"),
        ("which parameters got a gradient", "which parameters got a gradient"),
        ("all of layers.0.weight", "all"),
        ("late gradients?", "late gradients"),
        ("layers.0.weight", "layers"),
        ("", ""),
    ],
)
def test_kinds_of_data_are_readable(label, kind):
    """Words, without the names and numbers of one collective."""
    assert kind_of(label) == kind


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


class Slow:
    """A handle that takes its time, and knows how long it took itself."""

    def __init__(self, seconds):
        self.seconds = seconds

    def wait(self):
        time.sleep(0.02)

    def done(self):
        return True

    def elapsed(self):
        return self.seconds


class SlowCommunicator(NullCommunicator):
    """Hands out handles that know when they ended, or that do not."""

    knows = True

    def issue(self, collective):
        handle = Slow(0.5)
        return handle if self.knows else Handles([handle])


@pytest.mark.parametrize("knows", [True, False])
def test_times_are_the_transports_where_it_knows_them(knows):
    """A collective's time is the transport's own, or else lasts until the end of waiting; that is what is exposed."""
    inner = SlowCommunicator(Mesh.build(4, 0), torch.device("cpu"))
    inner.knows = knows
    comm = TracedCommunicator(inner)
    handle = comm.all_reduce(torch.zeros(1000))
    handle.wait()
    handle.wait()  # counts once
    (row,) = comm.traffic()
    assert row.exposed >= 0.02
    assert row.seconds == 0.5 if knows else row.seconds >= row.exposed
    cells = comm.table().splitlines()[1].split()
    sent = 2 * 3 / 4 * 4000
    assert float(cells[-1]) == pytest.approx(sent / row.seconds / 1e9, abs=0.01)


class Event:
    """A device's event: the clock goes on by one second with each that is recorded."""

    now = 0
    reached = 0

    def record(self):
        Event.now += 1
        self.at = Event.now

    def query(self):
        return self.at <= Event.reached

    def synchronize(self):
        Event.reached = max(Event.reached, self.at)

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


def test_times_of_a_device_are_its_own(monkeypatch):
    """Events lie around the waiting; they are read once the device has come that far."""
    monkeypatch.setattr(torch, "Event", lambda device, enable_timing: Event())
    clock, sums = DeviceClock(torch.device("meta")), Row()
    handles = [DeviceTimed(Slow(0.0), sums, clock, clock.event()) for _ in range(2)]
    for handle in handles:
        handle.wait()
        handle.wait()
    assert sums == Row()
    clock.settle()
    assert sums == Row(seconds=3.0 + 4.0, exposed=2.0)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x)


def trained(settings):
    """Train two steps with an engine; return the table, and who waits for whom."""
    config = {"observe": settings, "batch": {"micro": 2}}
    with powertrain.initialize(Net(), config, loss_fn=torch.nn.MSELoss()) as engine:
        for _ in range(2):
            engine.train_step((torch.ones(2, 64), torch.zeros(2, 64)))
        rows = [row for row in engine.context.communicator.traffic() if row.data == "gradients"]
        return comm_table(engine), [(r.operation, r.dimension, r.calls, r.bytes, r.seconds > 0) for r in rows]


def test_the_section_switches_it_on(ranks):
    """``[observe] comm = true`` counts and times a run's collectives, at any moment; without it nothing is counted."""
    expected = ("all_reduce", "data", 2, 2 * 4 * (64 * 64 + 64 + 2), True)
    for table, rows in ranks(2, trained, {"comm": True}):
        assert rows == [expected]
        assert "exposed ms" in table
    assert ranks(2, trained, {}) == [("", [])] * 2


def test_the_table_comes_every_so_many_steps(caplog):
    """With ``comm_every``, rank 0 shows it after each of those steps."""
    caplog.set_level(logging.INFO, "powertrain.observe")
    trained({"comm": True, "comm_every": 1})
    told = [record.getMessage().partition("\n")[0] for record in caplog.records]
    assert told[:2] == ["collectives of rank 0 up to step 1:", "collectives of rank 0 up to step 2:"]


def test_every_needs_comm():
    """A number of steps without anything to show is a mistake."""
    with pytest.raises(ValueError, match="needs comm = true"):
        ObserveConfig(comm_every=3)
    with pytest.raises(ValueError, match="0 or more"):
        ObserveConfig(comm=True, comm_every=-1)


def test_one_rank_can_be_traced():
    """A world of one is traced where that is asked for."""
    alone = SingleProcess(Mesh.build(1, 0), torch.device("cpu"))
    comm = ObservePlugin(ObserveConfig(comm=True)).wrap_communicator(alone)
    assert isinstance(comm, TracedCommunicator)
    assert ObservePlugin(ObserveConfig()).wrap_communicator(alone) is None


def test_the_plugin_imports_no_torch():
    """Importing the entry point's module loads no torch."""
    code = "import sys, powertrain_observe.plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("silent", [False, True])
def test_a_timed_handle_is_as_silent_as_what_it_times(silent: bool) -> None:
    """A watchdog must know that only waiting tells, behind the tracer too."""
    inner = SimpleNamespace(silent=silent)
    assert HostTimed(inner, Row(), 0.0).silent is silent  # type: ignore[arg-type]
    assert DeviceTimed(inner, Row(), None, None).silent is silent  # type: ignore[arg-type]
