"""What one rank does, and finds, in each test of ``CommunicatorContract``.

Every function is run by all ranks at once, each with its own communicator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from powertrain.errors import ShardingError
from powertrain.roles.communicator import Collective, Communicator, Reduction

LATE = 0.15
"""Seconds by which the last rank comes late, where that must not matter."""


def connected(
    factory: Callable[[Mapping[str, int] | None], Communicator],
    sizes: Mapping[str, int] | None,
    check: Callable[..., Any],
    args: Sequence[Any],
) -> Any:
    """Run ``check`` on a new communicator, and close it."""
    communicator = factory(sizes)
    try:
        return check(communicator, *args)
    except BaseException as error:
        communicator.report(error)
        raise
    finally:
        communicator.close()


def values(communicator: Communicator, numel: int, index: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return numbers that tell both their place and whose they are, small enough for every type."""
    numbers = torch.arange(numel) % 7 + 10 * (index + 1)
    return numbers.to(dtype).to(communicator.device)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equality of type, shape and every bit of value."""
    assert found.dtype == expected.dtype, f"{found.dtype} in place of {expected.dtype}"
    assert found.shape == expected.shape, f"{tuple(found.shape)} in place of {tuple(expected.shape)}"
    assert torch.equal(found.cpu(), expected.cpu()), f"{found.cpu()} in place of {expected.cpu()}"


def place(communicator: Communicator) -> tuple[int, int, int, int]:
    """Return where this rank believes to be."""
    return communicator.rank, communicator.world_size, communicator.index("data"), communicator.size("data")


def all_reduce_sums(communicator: Communicator, dtypes: Sequence[torch.dtype]) -> None:
    """Reduce tensors of several types and shapes."""
    n, me = communicator.size("data"), communicator.index("data")
    for dtype in dtypes:
        for shape in ((), (1,), (13,), (3, 5)):
            numel = torch.Size(shape).numel()
            tensor = values(communicator, numel, me, dtype).view(shape)
            communicator.all_reduce(tensor).wait()
            parts = [values(communicator, numel, i, torch.int64) for i in range(n)]
            same(tensor, torch.stack(parts).sum(0).to(dtype).view(shape))


def all_reduce_reduces(communicator: Communicator) -> None:
    """Reduce in the other ways."""
    n, me = communicator.size("data"), communicator.index("data")
    stacked = torch.stack([values(communicator, 11, i) * (-1) ** i for i in range(n)])
    wanted: dict[Reduction, torch.Tensor] = {
        "sum": stacked.sum(0),
        "mean": stacked.mean(0),
        "max": stacked.amax(0),
        "min": stacked.amin(0),
    }
    for reduction, expected in wanted.items():
        tensor = stacked[me].clone()
        communicator.all_reduce(tensor, reduction=reduction).wait()
        assert torch.allclose(tensor, expected, rtol=1e-6), f"{reduction}: {tensor} in place of {expected}"


def all_reduce_keeps_digits(communicator: Communicator) -> None:
    """Reduce numbers that no narrower type could hold."""
    n, me = communicator.size("data"), communicator.index("data")
    generator = torch.Generator().manual_seed(1)
    parts = torch.rand(n, 50, generator=generator, dtype=torch.float64) + 1
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        tensor = parts[me].to(communicator.device, dtype, copy=True)
        communicator.all_reduce(tensor).wait()
        assert torch.allclose(tensor.cpu().double(), parts.sum(0), rtol=limit, atol=0), (
            f"{dtype} lost digits on the way"
        )


def all_reduce_random(communicator: Communicator) -> list[bytes]:
    """Reduce numbers whose sum depends on the order; return the bits of two tries."""
    generator = torch.Generator().manual_seed(communicator.rank)
    numbers = torch.randn(1001, generator=generator) * 10.0 ** torch.randint(-6, 6, (1001,), generator=generator)
    results = []
    for _ in range(2):
        tensor = numbers.to(communicator.device, copy=True)
        communicator.all_reduce(tensor).wait()
        results.append(bytes(tensor.cpu().view(torch.uint8).tolist()))
    assert results[0] == results[1], "the same reduction gave two results"
    return results


def all_gather_orders(communicator: Communicator, dtypes: Sequence[torch.dtype]) -> None:
    """Gather pieces that say whose they are."""
    n, me = communicator.size("data"), communicator.index("data")
    for dtype in dtypes:
        piece = values(communicator, 5, me, dtype)
        output = torch.zeros(5 * n, dtype=dtype, device=communicator.device)
        communicator.all_gather(output, piece).wait()
        same(output, torch.cat([values(communicator, 5, i, dtype) for i in range(n)]))
        same(piece, values(communicator, 5, me, dtype))


def reduce_scatter_pieces(communicator: Communicator) -> None:
    """Reduce, and keep one piece."""
    n, me = communicator.size("data"), communicator.index("data")
    inputs = [values(communicator, 4 * n, i) + torch.arange(4 * n, device=communicator.device) for i in range(n)]
    for reduction in ("sum", "mean"):
        given = inputs[me].clone()
        output = torch.zeros(4, device=communicator.device)
        communicator.reduce_scatter(output, given, reduction=reduction).wait()
        total = torch.stack(inputs).sum(0)[me * 4 : (me + 1) * 4]
        expected = total if reduction == "sum" else total / n
        assert torch.allclose(output, expected, rtol=1e-6), f"{reduction}: {output} in place of {expected}"
        same(given, inputs[me])


def in_place(communicator: Communicator, dtypes: Sequence[torch.dtype]) -> None:
    """Gather out of the own piece of the output, and scatter into the own piece of the input."""
    n, me = communicator.size("data"), communicator.index("data")
    for dtype in dtypes:
        for numel in (1, 5, 70001):
            gathered = torch.zeros(n * numel, dtype=dtype, device=communicator.device)
            mine = gathered[numel * me : numel * (me + 1)]
            mine.copy_(values(communicator, numel, me, dtype))
            communicator.all_gather(gathered, mine).wait()
            same(gathered, torch.cat([values(communicator, numel, i, dtype) for i in range(n)]))

            given = values(communicator, n * numel, me, dtype)
            piece = given[numel * me : numel * (me + 1)]
            communicator.reduce_scatter(piece, given).wait()
            parts = [values(communicator, n * numel, i, torch.int64) for i in range(n)]
            same(piece, torch.stack(parts).sum(0)[numel * me : numel * (me + 1)].to(dtype))


def gather_of_scatter(communicator: Communicator) -> None:
    """Do in two steps what one does."""
    n, me = communicator.size("data"), communicator.index("data")
    full = values(communicator, 31 * n, me)
    piece = torch.zeros(31, device=communicator.device)
    communicator.reduce_scatter(piece, full).wait()
    both = torch.zeros(31 * n, device=communicator.device)
    communicator.all_gather(both, piece).wait()
    communicator.all_reduce(full).wait()
    same(both, full)


def all_to_all_exchanges(communicator: Communicator) -> None:
    """Exchange equal pieces."""
    n, me = communicator.size("data"), communicator.index("data")
    given = torch.tensor([100 * me + 10 * i + k for i in range(n) for k in range(2)], device=communicator.device)
    kept, output = given.clone(), torch.zeros_like(given)
    communicator.all_to_all(output, given).wait()
    expected = torch.tensor([100 * i + 10 * me + k for i in range(n) for k in range(2)])
    same(output, expected)
    same(given, kept)


def all_to_all_uneven(communicator: Communicator) -> None:
    """Send (source + destination) rows of two columns from each to each."""
    n, me = communicator.size("data"), communicator.index("data")
    splits = [me + i for i in range(n)]

    def rows(source: int, target: int) -> torch.Tensor:
        return torch.full((source + target, 2), float(10 * source + target), device=communicator.device)

    given = torch.cat([rows(me, i) for i in range(n)])
    output = torch.zeros(sum(splits), 2, device=communicator.device)
    communicator.all_to_all(output, given, output_splits=splits, input_splits=splits).wait()
    same(output, torch.cat([rows(i, me) for i in range(n)]))


def broadcast_copies(communicator: Communicator) -> None:
    """Let each index in turn be the source."""
    n, me = communicator.size("data"), communicator.index("data")
    for source in range(n):
        tensor = values(communicator, 9, me)
        communicator.broadcast(tensor, source).wait()
        same(tensor, values(communicator, 9, source))


def ring(communicator: Communicator) -> None:
    """Pass two messages on to the next, and take two from the one before."""
    n, me = communicator.size("data"), communicator.index("data")
    following, before = (me + 1) % n, (me - 1) % n
    given = [values(communicator, 6, me) + 100 * k for k in range(2)]
    taken = [torch.zeros(6, device=communicator.device) for _ in range(2)]
    handles = [communicator.send(tensor, following, "data") for tensor in given]
    handles += [communicator.receive(tensor, before, "data") for tensor in taken]
    for handle in handles:
        handle.wait()
    for k, tensor in enumerate(taken):
        same(tensor, values(communicator, 6, before) + 100 * k)


def barrier_waits(communicator: Communicator, directory: str) -> None:
    """Leave a mark before the barrier, look for everybody's after it; the last rank comes late."""
    if communicator.rank == communicator.world_size - 1:
        time.sleep(LATE)
    Path(directory, str(communicator.rank)).touch()
    communicator.barrier().wait()
    present = sorted(path.name for path in Path(directory).iterdir())
    assert present == [str(rank) for rank in range(communicator.world_size)], f"only {present} had come"


def wait_means_done(communicator: Communicator) -> None:
    """Wait for a rank that comes late, for each operation that brings a result."""
    n, me = communicator.size("data"), communicator.index("data")
    late = me == n - 1
    device = communicator.device

    if late:
        time.sleep(LATE)
    tensor = values(communicator, 8, me)
    handle = communicator.all_reduce(tensor)
    handle.wait()
    same(tensor, torch.stack([values(communicator, 8, i) for i in range(n)]).sum(0))
    assert handle.done()
    handle.wait()

    if late:
        time.sleep(LATE)
    output = torch.zeros(8 * n, device=device)
    communicator.all_gather(output, values(communicator, 8, me)).wait()
    same(output, torch.cat([values(communicator, 8, i) for i in range(n)]))


def several_in_flight(communicator: Communicator) -> None:
    """Start six collectives, then wait from the last to the first."""
    n, me = communicator.size("data"), communicator.index("data")
    tensors = [values(communicator, 20 + k, me) * (k + 1) for k in range(6)]
    handles = [communicator.all_reduce(tensor) for tensor in tensors]
    for handle in reversed(handles):
        handle.wait()
    for k, tensor in enumerate(tensors):
        same(tensor, torch.stack([values(communicator, 20 + k, i) * (k + 1) for i in range(n)]).sum(0))


def together(communicator: Communicator) -> None:
    """Start different collectives as one."""
    n, me = communicator.size("data"), communicator.index("data")
    reduced = values(communicator, 7, me)
    gathered = torch.zeros(3 * n, device=communicator.device)
    scattered = torch.zeros(2, device=communicator.device)
    piece, whole = values(communicator, 3, me), values(communicator, 2 * n, me)
    communicator.issue_together(
        [
            Collective(operation="all_reduce", dimension="data", input=reduced, output=reduced),
            Collective(operation="all_gather", dimension="data", input=piece, output=gathered),
            Collective(operation="reduce_scatter", dimension="data", input=whole, output=scattered),
        ]
    ).wait()
    same(reduced, torch.stack([values(communicator, 7, i) for i in range(n)]).sum(0))
    same(gathered, torch.cat([values(communicator, 3, i) for i in range(n)]))
    total = torch.stack([values(communicator, 2 * n, i) for i in range(n)]).sum(0)
    same(scattered, total[2 * me : 2 * me + 2])


def allocated_memory_works(communicator: Communicator, dtypes: Sequence[torch.dtype]) -> None:
    """Reduce and gather in buffers that the communicator allocated."""
    n, me = communicator.size("data"), communicator.index("data")
    for dtype in dtypes:
        buffer = communicator.empty(6 * n, dtype, "data")
        assert buffer.shape == (6 * n,)
        assert buffer.dtype == dtype
        assert buffer.device == communicator.device
        assert buffer.is_contiguous()
        mine = buffer[6 * me : 6 * (me + 1)]
        mine.copy_(values(communicator, 6, me, dtype))
        communicator.all_gather(buffer, mine.clone()).wait()
        same(buffer, torch.cat([values(communicator, 6, i, dtype) for i in range(n)]))


def large(communicator: Communicator) -> None:
    """Reduce a tensor that no transport sends in one piece."""
    n, me = communicator.size("data"), communicator.index("data")
    numel = 2**20 + 13
    tensor = values(communicator, numel, me)
    communicator.all_reduce(tensor).wait()
    expected = values(communicator, numel, 0)
    for i in range(1, n):
        expected += values(communicator, numel, i)
    same(tensor, expected)


def json_values(communicator: Communicator) -> None:
    """Gather values of different kinds and lengths."""
    n, me = communicator.world_size, communicator.rank

    def value(rank: int) -> Any:
        return {"rank": rank, "words": ["ä" * rank] * rank, "none": None}

    assert communicator.gather_json(value(me)) == [value(rank) for rank in range(n)]


def dimensions(communicator: Communicator) -> None:
    """Reduce along each dimension of a mesh, and over all of it."""
    for dimension in ("data", "tensor", "world"):
        tensor = torch.tensor([2**communicator.rank], device=communicator.device)
        communicator.all_reduce(tensor, dimension).wait()
        peers = communicator.mesh.peers(dimension)
        same(tensor, torch.tensor([sum(2**rank for rank in peers)]))
        output = torch.zeros(len(peers), dtype=torch.int64, device=communicator.device)
        communicator.all_gather(output, torch.tensor([communicator.rank], device=communicator.device), dimension).wait()
        same(output, torch.tensor(peers))


def splits(communicator: Communicator) -> None:
    """Cut four ranks along ``data`` in each way, and use what comes of it."""
    me = communicator.index("data")
    expected = {1: ((me,), (0, 1, 2, 3)), 4: ((0, 1, 2, 3), (me,))}
    expected[2] = ((0, 1) if me < 2 else (2, 3), (0, 2) if me % 2 == 0 else (1, 3))
    for size, groups in expected.items():
        names = communicator.split("data", size)
        assert names == (f"data.within{size}", f"data.across{size}")
        assert communicator.split("data", size) == names
        for name, peers in zip(names, groups, strict=True):
            along(communicator, name, peers)
    inner = communicator.split("data.across2", 2)
    along(communicator, inner[0], expected[2][1])
    with pytest.raises(ShardingError, match="groups of 3") as caught:
        communicator.split("data", 3)
    assert caught.value.expected == "one of 1, 2, 4"


def splits_the_world(communicator: Communicator) -> None:
    """Cut the world and a dimension of a mesh of 2 x 2, whose groups are not neighbours in rank."""
    me = communicator.rank
    for dimension, size, groups in (
        ("world", 2, ((me // 2 * 2, me // 2 * 2 + 1), (me % 2, me % 2 + 2))),
        ("data", 2, ((me % 2, me % 2 + 2), (me,))),
        ("tensor", 1, ((me,), (me // 2 * 2, me // 2 * 2 + 1))),
    ):
        for name, peers in zip(communicator.split(dimension, size), groups, strict=True):
            along(communicator, name, peers)


def along(communicator: Communicator, name: str, peers: tuple[int, ...]) -> None:
    """Assert that ``peers`` lie along ``name``, and that every kind of operation joins them and nobody else."""
    n, me = len(peers), peers.index(communicator.rank)
    assert (communicator.size(name), communicator.index(name)) == (n, me)
    assert communicator.mesh.peers(name) == peers
    device = communicator.device
    tensor = torch.tensor([2**communicator.rank], device=device)
    communicator.all_reduce(tensor, name).wait()
    same(tensor, torch.tensor([sum(2**rank for rank in peers)]))
    gathered = communicator.empty(n, torch.int64, name)
    communicator.all_gather(gathered, torch.tensor([communicator.rank], device=device), name).wait()
    same(gathered, torch.tensor(peers))
    piece = torch.zeros(1, dtype=torch.int64, device=device)
    communicator.reduce_scatter(piece, torch.arange(n, device=device) + communicator.rank, name).wait()
    same(piece, torch.tensor([n * me + sum(peers)]))
    exchanged = torch.zeros(n, dtype=torch.int64, device=device)
    communicator.all_to_all(exchanged, torch.arange(n, device=device) + 10 * communicator.rank, name).wait()
    same(exchanged, torch.tensor([10 * rank + me for rank in peers]))
    copied = torch.tensor([communicator.rank], device=device)
    communicator.broadcast(copied, n - 1, name).wait()
    same(copied, torch.tensor([peers[-1]]))
    communicator.barrier(name).wait()
    assert communicator.gather_json({"rank": communicator.rank}, name) == [{"rank": rank} for rank in peers]
    if n > 1:
        taken = torch.zeros(1, dtype=torch.int64, device=device)
        sending = communicator.send(torch.tensor([communicator.rank], device=device), (me + 1) % n, name)
        communicator.receive(taken, (me - 1) % n, name).wait()
        sending.wait()
        same(taken, torch.tensor([peers[(me - 1) % n]]))


def describes(communicator: Communicator) -> None:
    """Look at the facts for people."""
    assert all(isinstance(word, str) for pair in communicator.describe().items() for word in pair)
