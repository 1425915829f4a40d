"""Collectives through shared memory, against what one process computes by itself."""

from __future__ import annotations

import os
import random
from pathlib import Path

import attrs
import pytest
import torch

from powertrain import native
from powertrain.environment import Rank
from powertrain.errors import CollectiveDiverged, CommunicatorMissing
from powertrain.mesh import Mesh
from powertrain.roles.communicator import WrappedCommunicator
from powertrain.testing.communicator import PooledCommunicatorContract
from powertrain_comm.shm.communicator import SharedMemoryCommunicator
from powertrain_comm.shm.hierarchy import neighbours
from powertrain_comm.shm.source import SOURCE
from powertrain_comm.shm.start import share
from powertrain_comm.transport import TorchCommunicator

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32, torch.int64]


def connect(sizes=None, timeout=30.0):
    """Return a communicator of this process's rank."""
    rank = Rank.from_environment()
    mesh = Mesh.build(rank.world_size, rank.index, sizes)
    return share(TorchCommunicator("gloo", torch.device("cpu"), mesh, rank, timeout), rank, timeout, asked=True)


class TestShared(PooledCommunicatorContract):
    """It is a communicator."""

    factory = staticmethod(connect)


def numbers(seed, count, dtype):
    """Return small whole numbers, whose sums are exact in every type."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (count,), generator=generator).to(dtype)


def placed(comm, values, where):
    """Return values in memory of the heap, in memory of their own, or at an odd place of either."""
    count = values.numel()
    shared = where in ("heap", "heap, odd")
    room = comm.empty(count + 3, values.dtype) if shared else torch.empty(count + 3, dtype=values.dtype)
    start = 3 if where.endswith("odd") else 0
    tensor = room[start : start + count]
    tensor.copy_(values)
    return tensor


def reduced(parts, reduction):
    """Reduce in this process."""
    stack = torch.stack([part.double() for part in parts])
    if reduction in ("sum", "mean"):
        return getattr(stack, reduction)(0)
    return stack.amax(0) if reduction == "max" else stack.amin(0)


def random_collectives(seed, rounds):
    """Issue random collectives, several at a time, and compare every result."""
    comm = connect()
    try:
        assert isinstance(comm, SharedMemoryCommunicator)
        same, own = random.Random(seed), random.Random(seed * 100 + comm.rank)
        n, me = comm.world_size, comm.rank
        for number in range(rounds):
            waiting = []
            for part in range(same.randint(1, 4)):
                key = seed * 10_000 + number * 100 + part * 10
                dtype = same.choice(DTYPES)
                count = same.choice([1, 2, 63, 64, 65, 1000, 1025, 5000, 70_001, 300_000, 600_001])
                operation = same.choice(
                    ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "barrier"]
                )
                reduction = same.choice(["sum", "max", "min", "mean"] if dtype.is_floating_point else ["sum", "max"])
                # Where a rank's tensors lie is its own affair: any mixture must work.
                where = [own.choice(["heap", "own", "heap, odd", "own, odd"]) for _ in range(2)]
                if operation == "all_reduce":
                    tensor = placed(comm, numbers(key + me, count, dtype), where[0])
                    handle = comm.all_reduce(tensor, reduction=reduction)
                    expected = reduced([numbers(key + r, count, dtype) for r in range(n)], reduction).to(dtype)
                elif operation == "reduce_scatter":
                    whole = placed(comm, numbers(key + me, count * n, dtype), where[0])
                    inside = own.random() < 0.5
                    mine = whole[count * me : count * (me + 1)]
                    tensor = mine if inside else placed(comm, torch.zeros(count, dtype=dtype), where[1])
                    handle = comm.reduce_scatter(tensor, whole, reduction=reduction)
                    total = reduced([numbers(key + r, count * n, dtype) for r in range(n)], reduction).to(dtype)
                    expected = total[count * me : count * (me + 1)]
                elif operation == "all_gather":
                    tensor = placed(comm, torch.zeros(count * n, dtype=dtype), where[0])
                    inside = own.random() < 0.5
                    mine = tensor[count * me : count * (me + 1)]
                    piece = mine if inside else placed(comm, torch.zeros(count, dtype=dtype), where[1])
                    piece.copy_(numbers(key + me, count, dtype))
                    handle = comm.all_gather(tensor, piece)
                    expected = torch.cat([numbers(key + r, count, dtype) for r in range(n)])
                elif operation == "all_to_all":
                    splits = [[same.randint(0, count // n + 1) for _ in range(n)] for _ in range(n)]
                    given = placed(comm, numbers(key + me, sum(splits[me]), dtype), where[0])
                    takes = [splits[r][me] for r in range(n)]
                    tensor = placed(comm, torch.zeros(sum(takes), dtype=dtype), where[1])
                    handle = comm.all_to_all(tensor, given, input_splits=splits[me], output_splits=takes)
                    pieces = [numbers(key + r, sum(splits[r]), dtype).split(splits[r])[me] for r in range(n)]
                    expected = torch.cat(pieces)
                elif operation == "broadcast":
                    source = same.randrange(n)
                    tensor = placed(comm, numbers(key + me, count, dtype), where[0])
                    handle = comm.broadcast(tensor, source)
                    expected = numbers(key + source, count, dtype)
                else:
                    tensor = expected = torch.zeros(0)
                    handle = comm.barrier()
                waiting.append((f"{operation} {reduction} {count} {dtype} {where}", handle, tensor, expected))
            own.shuffle(waiting)
            for what, handle, tensor, expected in waiting:
                handle.wait()
                assert handle.done()
                assert torch.equal(tensor, expected), f"round {number}: {what}"
    finally:
        comm.close()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_random_collectives_give_what_one_process_computes(ranks, n):
    """Any operation, type, length, place and mixture of memory, several under way at once, waited for in any order."""
    for seed in range(2):
        ranks(n, random_collectives, seed, 40)


def messages(rounds):
    """Send to and receive from everybody at once, in an order that differs between ranks."""
    comm = connect()
    try:
        n, me = comm.world_size, comm.rank
        own = random.Random(me)
        for number in range(rounds):
            count = [1, 100, 5000, 300_000][number % 4]
            calls = []
            for other in (r for r in range(n) if r != me):
                calls.append(("send", other, numbers(number * 100 + me * 10 + other, count, torch.float32)))
                calls.append(("receive", other, torch.empty(count)))
            own.shuffle(calls)
            handles = [getattr(comm, what)(tensor, other, "data") for what, other, tensor in calls]
            for handle, (what, other, tensor) in zip(handles, calls, strict=True):
                handle.wait()
                if what == "receive":
                    assert torch.equal(tensor, numbers(number * 100 + other * 10 + me, count, torch.float32))
    finally:
        comm.close()


def test_messages_between_all_ranks_at_once(ranks):
    """Every pair sends to each other at the same time; nobody waits for an order that the others do not keep."""
    ranks(3, messages, 12)


def progress():
    """Return whether a collective ended while this rank only computed."""
    comm = connect()
    try:
        tensor = comm.empty(4_000_000, torch.float32).fill_(1.0)
        handle = comm.all_reduce(tensor)
        work = torch.ones(200, 200)
        for _ in range(100_000):
            if handle.done():
                return bool((tensor == comm.world_size).all())
            work = (work @ work).clamp(max=1.0)
        return False
    finally:
        comm.close()


def test_collectives_get_on_while_python_computes(ranks):
    """Nobody waits for it, and yet it ends."""
    assert ranks(2, progress) == [True, True]


def both_dimensions():
    """Use two dimensions and the halves of a cut one; lanes must not mix."""
    comm = connect({"data": 2, "tensor": 2})
    try:
        data, tensor = comm.index("data"), comm.index("tensor")
        within, across = comm.split("world", 2)
        for count in (10, 100_000):
            values = [torch.full((count,), float(comm.rank + 1)) for _ in range(5)]
            dimensions = ("data", "tensor", "world", within, across)
            handles = [comm.all_reduce(v, d) for v, d in zip(values, dimensions, strict=True)]
            for handle in reversed(handles):
                handle.wait()
            for value, dimension in zip(values, dimensions, strict=True):
                assert (value == sum(rank + 1 for rank in comm.mesh.peers(dimension))).all(), (dimension, data, tensor)
    finally:
        comm.close()


def test_dimensions_do_not_mix(ranks):
    """Collectives of several dimensions are under way at once, each among its own ranks."""
    ranks(4, both_dimensions)


def in_place():
    """Return whether a peer reads what is written into memory of ``empty`` after it has started to wait."""
    comm = connect()
    try:
        assert comm.empty(0, torch.float32).numel() == 0
        heap = comm._host.heap
        tensor, copy = comm.empty(1000, torch.float32), torch.empty(1000)
        assert heap.contains(tensor.data_ptr(), 4000)
        assert not heap.contains(copy.data_ptr(), 4000)
        view = tensor[10:20]
        address = tensor.data_ptr()
        del tensor
        assert comm.empty(1000, torch.float32).data_ptr() != address  # a view keeps it
        del view
        return comm.empty(1000, torch.float32).data_ptr() == address
    finally:
        comm.close()


def test_memory_goes_back_when_its_last_view_is_gone(ranks):
    """Views keep memory; without them, the next one gets it."""
    assert ranks(2, in_place) == [True, True]


def diverging():
    """Issue different collectives; return the error's code."""
    comm = connect()
    try:
        tensor = torch.ones(5000 + comm.rank)
        try:
            comm.all_reduce(tensor).wait()
        except CollectiveDiverged as error:
            comm.report(error)
            return error.code, str(error)
        return "none", ""
    finally:
        comm.close()


def test_ranks_that_differ_are_told(ranks):
    """Tensors of two lengths are an error on every rank, and it names the other."""
    (code, text), (other_code, other_text) = ranks(2, diverging)
    assert (code, other_code) == ("PT503", "PT503")
    assert "rank 1 issued another collective" in text
    assert "rank 0 issued another collective" in other_text
    assert "elements of torch.float32" in text


def without(reason):
    """Connect where one rank has no C++; return what it became, or the error."""
    rank = Rank.from_environment()
    inner = TorchCommunicator("gloo", torch.device("cpu"), Mesh.build(rank.world_size, rank.index), rank, 30.0)
    if rank.index == 1:
        os.environ["POWERTRAIN_NATIVE"] = "0"
    try:
        comm = share(inner, rank, 30.0, asked=reason == "asked")
    except CommunicatorMissing as error:
        return str(error)
    finally:
        os.environ.pop("POWERTRAIN_NATIVE", None)
    try:
        tensor = torch.ones(3)
        comm.all_reduce(tensor).wait()
        return type(comm).__name__, tensor.tolist()
    finally:
        comm.close()


def test_one_rank_without_it_is_enough_to_go_without(ranks):
    """All ranks fall back together; where it was asked for by name, it is an error on all of them."""
    assert ranks(2, without, "default") == [("TorchCommunicator", [2.0] * 3)] * 2
    for text in ranks(2, without, "asked"):
        assert "PT501" in text
        assert "rank 1" in text


def mapped():
    """Return the files that this process maps or holds open, in any directory of shared memory, while it is in use."""
    comm = connect()
    try:
        tensor = comm.empty(1_000_000, torch.float32).fill_(1)
        comm.all_reduce(tensor).wait()
        maps = Path("/proc/self/maps").read_text().splitlines()
        links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        assert any("memfd:powertrain" in line for line in maps)
        return [text for text in (*maps, *links) if "/dev/shm/" in text]
    finally:
        comm.close()


def test_nothing_lies_in_a_directory(ranks):
    """The shared memory has no name that anything could be left behind under."""
    assert ranks(2, mapped) == [[], []]


def test_the_module_is_built_once():
    """The source stands in the cache under one key."""
    built = native.build(SOURCE)
    assert Path(built.path).exists()
    assert native.find(SOURCE) == built


def connect_hosts(sizes=None):
    """Return a communicator of this process's rank, as if every host had two ranks."""
    rank = Rank.from_environment()
    rank = attrs.evolve(rank, local_index=rank.index % 2, local_size=2)
    mesh = Mesh.build(rank.world_size, rank.index, sizes)
    return share(TorchCommunicator("gloo", torch.device("cpu"), mesh, rank, 30.0), rank, 30.0, asked=True)


class TestHosts(PooledCommunicatorContract):
    """It is a communicator as well where its ranks are on several hosts."""

    factory = staticmethod(connect_hosts)
    world_sizes = (4,)


def across_hosts():
    """Reduce, scatter and gather among four ranks of two hosts; return which way they went."""
    comm = connect_hosts()
    try:
        n, me = comm.world_size, comm.rank
        comm.inner = Counted(comm.inner)
        for count in (70_000, 70_001, 300_003):
            tensor = comm.empty(count, torch.float32)
            tensor.copy_(numbers(me, count, torch.float32))
            handle = comm.all_reduce(tensor, reduction="mean")
            whole = numbers(10 + me, count * n, torch.float32)
            piece = torch.empty(count)
            scatter = comm.reduce_scatter(piece, whole)
            everything = torch.empty(count * n)
            gather = comm.all_gather(everything, torch.full((count,), float(me)))
            for each in (gather, scatter, handle):
                each.wait()
            assert torch.equal(tensor, reduced([numbers(r, count, torch.float32) for r in range(n)], "mean").float())
            total = reduced([numbers(10 + r, count * n, torch.float32) for r in range(n)], "sum").float()
            assert torch.equal(piece, total[count * me : count * (me + 1)])
            assert torch.equal(everything, torch.arange(n).float().repeat_interleave(count))
        return comm.inner.count
    finally:
        comm.close()


class Counted(WrappedCommunicator):
    """Counts what goes over the network as it is."""

    count = 0

    def issue(self, collective):
        """Count one."""
        self.count += 1
        return self.inner.issue(collective)


def test_several_hosts_go_through_each_hosts_memory_first(ranks):
    """Results are right, and nothing large goes over the network rank by rank."""
    assert ranks(4, across_hosts) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [((0, 0, 1, 1), 2), ((0, 1, 0, 1), 0), ((0, 0, 0, 1), 0), ((0, 1, 2, 3), 1), ((0, 0, 0, 0), 4)],
)
def test_neighbours(hosts, expected):
    """Only even runs of neighbours make hosts that a dimension can be cut by."""
    assert neighbours(Mesh.build(4, 0), "data", hosts) == expected


def strided():
    """Give every collective a tensor that does not lie in one piece; return what is said."""
    comm = connect()
    square = torch.ones(8, 8)
    told = []
    try:
        for start in (
            lambda: comm.all_reduce(square[:, 0]),
            lambda: comm.broadcast(torch.zeros(1).expand(9000), 0),
            lambda: comm.all_gather(torch.empty(16, 8), square.t()),
        ):
            with pytest.raises(ValueError, match="takes contiguous tensors") as error:
                start()
            told.append(str(error.value))
        comm.barrier().wait()
        assert torch.equal(square, torch.ones(8, 8))
        return told
    finally:
        comm.close()


def test_tensors_lie_in_one_piece(ranks):
    """What would be read and written beside the tensor is refused, with its strides and the remedy."""
    for told in ranks(2, strided):
        assert told[0].startswith("all_reduce takes contiguous tensors, not (8,) with strides (8,)")
        assert ".contiguous()" in told[0]
