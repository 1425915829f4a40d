"""Every operation over gloo, against what one process computes by itself."""

from __future__ import annotations

import math
import time

import pytest
import torch

from powertrain.environment import Rank
from powertrain.mesh import Mesh
from powertrain_comm.transport import TorchCommunicator

FLOATS = ["float32", "bfloat16", "float16"]
KINDS = [*FLOATS, "int64"]


def connect(**sizes):
    """Return a communicator of this process's rank."""
    rank = Rank.from_environment()
    mesh = Mesh.build(rank.world_size, rank.index, sizes)
    return TorchCommunicator("gloo", torch.device("cpu"), mesh, rank, 30.0)


def values(rank, count, dtype):
    """Return small whole numbers that differ by rank and place, exact in every type."""
    return (torch.arange(count) % 7 + rank).to(dtype)


def reference(tensors, reduction):
    """Reduce in this process."""
    stack = torch.stack([tensor.double() for tensor in tensors])
    if reduction in ("sum", "mean"):
        return getattr(stack, reduction)(0)
    return stack.amax(0) if reduction == "max" else stack.amin(0)


def reduce_everywhere(dtype_name, reduction):
    dtype = getattr(torch, dtype_name)
    comm = connect()
    try:
        n = comm.world_size
        whole = values(comm.rank, 6, dtype)
        comm.all_reduce(whole, reduction=reduction).wait()
        expected = reference([values(r, 6, dtype) for r in range(n)], reduction).to(dtype)
        assert torch.equal(whole, expected)
        piece = torch.empty(5, dtype=dtype)
        comm.reduce_scatter(piece, values(comm.rank, 5 * n, dtype), reduction=reduction).wait()
        total = reference([values(r, 5 * n, dtype) for r in range(n)], reduction).to(dtype)
        assert torch.equal(piece, total[5 * comm.rank : 5 * comm.rank + 5])
    finally:
        comm.close()


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "min"])
def test_reductions_equal_a_local_reduction(ranks, n, reduction):
    """Reductions over 2 and 4 ranks equal the same reduction in one process, in every float type."""
    for dtype in FLOATS:
        ranks(n, reduce_everywhere, dtype, reduction)


@pytest.mark.parametrize("reduction", ["sum", "max", "min"])
def test_integers_reduce(ranks, reduction):
    """Integers reduce by sum, max and min."""
    ranks(2, reduce_everywhere, "int64", reduction)


def move(dtype_name):
    dtype = getattr(torch, dtype_name)
    comm = connect()
    n, me = comm.world_size, comm.rank
    gathered = torch.empty(n * 6, dtype=dtype)
    comm.all_gather(gathered, values(me, 6, dtype).view(2, 3)).wait()
    assert torch.equal(gathered, torch.cat([values(r, 6, dtype) for r in range(n)]))

    swapped = torch.empty(n * 2, dtype=dtype)
    comm.all_to_all(swapped, values(10 * me, n * 2, dtype)).wait()
    assert torch.equal(swapped, torch.cat([values(10 * r, n * 2, dtype)[2 * me : 2 * me + 2] for r in range(n)]))

    # Rank r sends i + 1 rows to index i, so this rank receives me + 1 rows from each.
    splits = [i + 1 for i in range(n)]
    start = sum(splits[:me])
    rows = torch.empty(n * (me + 1), 3, dtype=dtype)
    sent = values(me, sum(splits) * 3, dtype).view(-1, 3)
    comm.all_to_all(rows, sent, input_splits=splits, output_splits=[me + 1] * n).wait()
    theirs = [values(r, sum(splits) * 3, dtype).view(-1, 3)[start : start + me + 1] for r in range(n)]
    assert torch.equal(rows, torch.cat(theirs))

    copied = values(me, 4, dtype)
    comm.broadcast(copied, n - 1).wait()
    assert torch.equal(copied, values(n - 1, 4, dtype))

    received = torch.empty(4, dtype=dtype)
    sending = comm.send(values(me, 4, dtype), (me + 1) % n, "data")
    comm.receive(received, (me - 1) % n, "data").wait()
    sending.wait()
    assert torch.equal(received, values((me - 1) % n, 4, dtype))
    comm.barrier().wait()
    comm.close()


@pytest.mark.parametrize("n", [2, 4])
def test_movements_equal_a_local_copy(ranks, n):
    """Gather, exchange (equal and uneven), broadcast, send and receive move every type unchanged."""
    for dtype in KINDS:
        ranks(n, move, dtype)


def two_dimensions():
    comm = connect(tensor=2)
    seen = {}
    for dimension in ("data", "tensor", "world", "pipe"):
        tensor = torch.tensor([float(2**comm.rank)])
        comm.all_reduce(tensor, dimension).wait()
        seen[dimension] = tensor.item()
    source = torch.tensor([comm.rank])
    comm.broadcast(source, 1, "data").wait()
    received = torch.empty(1)
    if comm.index("tensor") == 0:
        comm.send(torch.tensor([float(comm.rank)]), 1, "tensor").wait()
    else:
        comm.receive(received, 0, "tensor").wait()
        assert received.item() == comm.rank - 1
    comm.close()
    return seen, source.item()


def test_groups_follow_the_mesh(ranks):
    """On a 2 x 2 mesh each dimension joins its own ranks, and one of size 1 joins nobody."""
    results = ranks(4, two_dimensions)
    for rank, (seen, source) in enumerate(results):
        data = sum(2**r for r in range(4) if r % 2 == rank % 2)
        tensor = sum(2**r for r in range(4) if r // 2 == rank // 2)
        assert seen == {"data": data, "tensor": tensor, "world": 15, "pipe": 2**rank}
        assert source == 2 + rank % 2


def overlap():
    comm = connect()
    tensors = [torch.full((8,), float(comm.rank + i)) for i in range(5)]
    handles = [comm.all_reduce(tensor, label=f"bucket {i}") for i, tensor in enumerate(tensors)]
    for handle in reversed(handles):
        handle.wait()
        handle.wait()
        assert handle.done()
    assert [tensor[0].item() for tensor in tensors] == [2 * i + 1 for i in range(5)]
    averaged = torch.tensor([float(comm.rank)])
    handle = comm.all_reduce(averaged, reduction="mean")
    handle.wait()
    handle.wait()
    assert averaged.item() == 0.5
    comm.close()


def test_handles_wait_in_any_order_and_twice(ranks):
    """Handles may be waited for in any order, and a second wait changes nothing."""
    ranks(2, overlap)


def together():
    from powertrain.roles.communicator import Collective

    comm = connect()
    n = comm.world_size
    reduced = [values(comm.rank, size, torch.float32) for size in (3, 5)]
    half = values(comm.rank, 4, torch.bfloat16)
    gathered = [torch.empty(n * size) for size in (2, 3)]
    scattered = [torch.empty(size) for size in (2, 3)]

    def reduce(tensor):
        return Collective(operation="all_reduce", dimension="data", input=tensor, output=tensor, reduction="mean")

    def gather(tensor):
        source = values(comm.rank, tensor.numel() // n, torch.float32)
        return Collective(operation="all_gather", dimension="data", input=source, output=tensor)

    def scatter(tensor):
        source = values(comm.rank, tensor.numel() * n, torch.float32)
        return Collective(operation="reduce_scatter", dimension="data", input=source, output=tensor, reduction="mean")

    mixed = [reduce(reduced[0]), gather(gathered[0]), reduce(half), *map(scatter, scattered)]
    handle = comm.issue_together([*mixed, reduce(reduced[1]), gather(gathered[1])])
    handle.wait()
    assert handle.done()
    for tensor in [*reduced, half]:
        parts = [values(r, tensor.numel(), tensor.dtype) for r in range(n)]
        assert torch.equal(tensor, reference(parts, "mean").to(tensor.dtype))
    for tensor in gathered:
        assert torch.equal(tensor, torch.cat([values(r, tensor.numel() // n, torch.float32) for r in range(n)]))
    for tensor in scattered:
        size = tensor.numel()
        total = reference([values(r, size * n, torch.float32) for r in range(n)], "mean").float()
        assert torch.equal(tensor, total[size * comm.rank : size * (comm.rank + 1)])
    comm.close()


def test_collectives_issued_together_equal_those_issued_alone(ranks):
    """A mixture issued together gives what each operation gives alone."""
    ranks(2, together)


def exchange_json():
    comm = connect()
    value = {"rank": comm.rank, "text": "ü" * comm.rank, "none": None}
    gathered = comm.gather_json(value)
    comm.close()
    return gathered


def test_json_gathers_in_order(ranks):
    """JSON values of different lengths arrive on every rank, in order of rank."""
    expected = [{"rank": rank, "text": "ü" * rank, "none": None} for rank in range(4)]
    assert ranks(4, exchange_json) == [expected] * 4


def two_at_once():
    import torch.distributed as dist

    first, second = connect(), connect()
    a, b = torch.tensor([1.0]), torch.tensor([10.0])
    waiting = first.all_reduce(a), second.all_reduce(b)
    for handle in waiting:
        handle.wait()
    first.close()
    assert dist.is_initialized()
    second.all_reduce(b).wait()
    second.close()
    second.close()
    assert (a.item(), b.item()) == (2.0, 40.0)
    assert not dist.is_initialized()


def test_two_communicators_in_one_process(ranks):
    """Two communicators work side by side; closing the first leaves the second whole, the last one cleans up."""
    ranks(2, two_at_once)


def beside_the_users():
    import torch.distributed as dist

    rank = Rank.from_environment()
    url = f"tcp://{rank.address}:{rank.port}"
    dist.init_process_group("gloo", init_method=url, rank=rank.index, world_size=rank.world_size)
    comm = connect()
    tensor = torch.ones(2)
    comm.all_reduce(tensor).wait()
    comm.close()
    dist.all_reduce(tensor)
    dist.destroy_process_group()
    return tensor.tolist()


def test_the_users_process_group_is_reused_and_left_alone(ranks):
    """A group that the user initialized is reused, and still works after close."""
    assert ranks(2, beside_the_users) == [[4.0, 4.0]] * 2


def another_size():
    import torch.distributed as dist

    from powertrain.errors import LaunchError

    rank = Rank.from_environment()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(LaunchError, match=f"rank {rank.index} of 2") as caught:
        connect()
    dist.destroy_process_group()
    return str(caught.value)


def test_a_process_group_of_another_size_is_refused(ranks):
    """A group of another size than the launch is an error that names both."""
    for text in ranks(2, another_size):
        assert "found: rank 0 of 1" in text


def wrong_use():
    comm = connect()
    with pytest.raises(ValueError, match=r"mean of torch\.int64"):
        comm.all_reduce(torch.ones(2, dtype=torch.int64), reduction="mean")
    with pytest.raises(ValueError, match="index 2 is not among the 2 ranks"):
        comm.broadcast(torch.ones(2), 2)
    with pytest.raises(ValueError, match="nobody to send"):
        comm.send(torch.ones(2), 0, "tensor")
    facts = comm.describe()
    comm.close()
    return facts


def test_wrong_uses_are_refused_in_words(ranks):
    """A mean of integers, an index that does not exist and a send to oneself say what is wrong."""
    for facts in ranks(2, wrong_use):
        assert facts["library"] == "torch.distributed (gloo)"


def meet_again(slow):
    sums = []
    for _ in range(3):
        comm = connect()
        tensor = torch.tensor([1.0])
        comm.all_reduce(tensor).wait()
        sums.append(tensor.item())
        if comm.rank == slow:
            time.sleep(0.3)
        comm.close()
        comm = None
    return sums


@pytest.mark.parametrize("slow", [0, 1])
def test_a_closed_communicator_can_be_replaced(ranks, slow):
    """After close, the same ranks meet again at the same address, whichever of them is slow to close."""
    assert ranks(2, meet_again, slow) == [[2.0] * 3] * 2


def test_reference_reduction_is_right():
    """The reference that these tests compare with computes what its name says."""
    tensors = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0])]
    for name, expected in {"sum": [4, 6], "mean": [2, 3], "max": [3, 4], "min": [1, 2]}.items():
        assert reference(tensors, name).tolist() == expected
    assert math.isclose(values(1, 9, torch.float32).sum().item(), 31.0)


def cut_whole():
    """Cut a dimension into one group; return whether it has a connection of its own, its table, and a sum over it."""
    comm = connect()
    try:
        (within, across) = comm.split("data", comm.size("data"))
        whole, own = comm._groups["data"], comm._groups[within]
        comm.all_reduce(total := torch.ones(3), within).wait()
        return own.handle is not whole.handle, own.table is whole.table, total.tolist(), comm._groups[across]
    finally:
        comm.close()


def test_a_group_of_all_has_a_connection_of_its_own(ranks):
    """Second hops of compressed reductions travel there, in another order than what goes along the dimension."""
    assert ranks(2, cut_whole) == [(True, True, [2.0] * 3, None)] * 2
