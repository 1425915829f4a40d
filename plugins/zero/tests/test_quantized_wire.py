"""Quantized collectives on ranks that are threads: the same values on every rank, the mean in every layout."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from powertrain.kernels.blockwise import BLOCK, Blockwise
from powertrain.roles.communicator import Collective, Communicator, Done, Handle, WrappedCommunicator
from powertrain.testing.loopback import LoopbackWorld
from powertrain_zero.quantized_reduce import QuantizedReduce
from powertrain_zero.quantized_wire import QuantizedGather

NUMEL = 3 * BLOCK


class Recorded(WrappedCommunicator):
    """Notes what is issued, and which handles were awaited."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.issued: list[Collective] = []
        self.awaited = 0

    def issue(self, collective: Collective) -> Handle:
        self.issued.append(collective)
        inner, outer = super().issue(collective), self

        class Counted(Done):
            def wait(self) -> None:
                outer.awaited += 1
                inner.wait()

        return Counted()


def elements(rank: int, numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(10 * seed + rank))


def gather(communicator: Communicator, dtype: torch.dtype) -> tuple[torch.Tensor, list[Collective]]:
    recorded = Recorded(communicator)
    wire = QuantizedGather(recorded, "data", Blockwise(8))
    full = torch.full((communicator.world_size * NUMEL,), torch.nan).to(dtype)
    handle = wire.gather(full, elements(communicator.rank, NUMEL), "p")
    handle.wait()
    handle.wait()  # once more changes nothing
    assert handle.done()
    assert recorded.awaited == 1
    return full, recorded.issued


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_rank_gets_what_travelled(dtype: torch.dtype) -> None:
    """One collective of bytes; all ranks, the owner included, hold the same bits, near the exact ones."""
    results = LoopbackWorld(4).run(gather, dtype)
    exact = torch.cat([elements(rank, NUMEL) for rank in range(4)])
    for full, issued in results:
        assert torch.equal(full, results[0][0])
        assert not torch.equal(full, exact.to(dtype))
        torch.testing.assert_close(full.float(), exact, rtol=1e-2, atol=0.02)
        (collective,) = issued
        assert collective.operation == "all_gather"
        assert collective.input is not None
        assert collective.input.dtype == torch.uint8
        assert collective.input.numel() == Blockwise(8).row_bytes(NUMEL)


def test_integers_travel_as_they_are() -> None:
    """A buffer of integers is gathered exactly."""

    def integers(communicator: Communicator) -> torch.Tensor:
        full = torch.zeros(2 * 16, dtype=torch.int64)
        shard = torch.arange(16) + 2**40 * (communicator.rank + 1)
        QuantizedGather(communicator, "data", Blockwise(8)).gather(full, shard, "p").wait()
        return full

    expected = torch.cat([torch.arange(16) + 2**40, torch.arange(16) + 2**41])
    assert all(torch.equal(full, expected) for full in LoopbackWorld(2).run(integers))


def reduce(
    communicator: Communicator, node: int, bits: Any, inputs: Any = elements, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Recorded]:
    recorded = Recorded(communicator)
    ranks = communicator.size("data")
    hops = ("data",) if node == ranks else communicator.split("data", node)
    whole = inputs(communicator.rank, ranks * NUMEL).to(dtype)
    index = communicator.index("data")
    output = whole[index * NUMEL : (index + 1) * NUMEL]  # in place, as gradients do it
    handle = QuantizedReduce(recorded, hops, Blockwise(bits)).reduce(output, whole, "g")
    handle.wait()
    handle.wait()
    assert handle.done()
    return output, recorded


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("ranks", "node"), [(2, 2), (4, 4), (4, 2), (6, 2), (6, 3)])
def test_each_rank_gets_its_piece_of_the_mean(ranks: int, node: int, bits: int) -> None:
    """In one hop or two, piece r arrives at rank r, off by the steps of the hops at most."""
    results = LoopbackWorld(ranks).run(reduce, node, bits)
    mean = torch.stack([elements(rank, ranks * NUMEL) for rank in range(ranks)]).mean(0).view(ranks, NUMEL)
    hops = 1 if node == ranks else 2
    step = 4.5 / (127 if bits == 8 else 7)  # no element of these is above 4.5
    for rank, (output, recorded) in enumerate(results):
        error = (output - mean[rank]).abs().max()
        assert 0 < float(error) <= step / 2 * hops
        assert [c.operation for c in recorded.issued] == ["all_to_all"] * hops
        assert recorded.awaited == hops
        row = Blockwise(bits).row_bytes(NUMEL)  # type: ignore[arg-type]
        assert [c.input.numel() for c in recorded.issued] == [ranks * row, ranks // node * row][:hops]  # type: ignore[union-attr]


@pytest.mark.parametrize("node", [2, 4])
def test_what_can_be_exact_is_exact(node: int) -> None:
    """Integers of the format sum without error: each goes where it belongs, through both hops."""

    def inputs(rank: int, numel: int) -> torch.Tensor:
        pieces = torch.arange(4).repeat_interleave(numel // 4) + 1.0
        return pieces * (rank + 1)  # constant blocks: piece p of rank r is (p + 1) (r + 1)

    results = LoopbackWorld(4).run(reduce, node, 8, inputs)
    for rank, (output, _) in enumerate(results):
        torch.testing.assert_close(output, torch.full((NUMEL,), 2.5 * (rank + 1)), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("node", [2, 4])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_arrives(bad: float, node: int, bits: int) -> None:
    """One bad element on one rank leaves its block of the mean without a finite one; other blocks stay finite."""

    def inputs(rank: int, numel: int) -> torch.Tensor:
        result = elements(rank, numel)
        if rank == 3:
            result[2 * NUMEL + BLOCK + 5] = bad  # in the second block of rank 2's piece
        return result

    results = LoopbackWorld(4).run(reduce, node, bits, inputs, torch.float16)
    finite = torch.stack([output.isfinite().view(3, BLOCK).all(-1) for output, _ in results])
    assert finite.flatten().tolist() == [True] * 7 + [False] + [True] * 4
    assert not bool(results[2][0][BLOCK : 2 * BLOCK].isfinite().any())


def test_fp16_gradients_are_summed_beyond_its_range() -> None:
    """Where only the sum leaves fp16, the mean is right: sums are fp32."""
    results = LoopbackWorld(4).run(reduce, 2, 8, lambda rank, numel: torch.full((numel,), 60000.0), torch.float16)
    assert all(float(output.max()) == float(output.min()) == 60000.0 for output, _ in results)


def test_the_same_bits_every_time() -> None:
    """Quantized reductions are deterministic, whichever rank comes first."""
    first, second = (LoopbackWorld(4).run(reduce, 2, 4) for _ in range(2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def test_second_hops_keep_the_order_of_the_reductions() -> None:
    """Ranks that wait in different orders issue the second hops in one order, and get the right results."""
    barrier = threading.Barrier(4)

    def several(communicator: Communicator) -> tuple[list[torch.Tensor], list[str]]:
        recorded = Recorded(communicator)
        wire = QuantizedReduce(recorded, communicator.split("data", 2), Blockwise(8))
        outputs = [torch.empty(NUMEL) for _ in range(4)]
        handles = [wire.reduce(outputs[k], elements(communicator.rank, 4 * NUMEL, seed=k), f"g{k}") for k in range(3)]
        if communicator.rank == 1:
            handles[1].wait()  # the others have started its second hop, although none has waited
        barrier.wait(10)
        handles.append(wire.reduce(outputs[3], elements(communicator.rank, 4 * NUMEL, seed=3), "g3"))
        order = [3, 0, 1, 2] if communicator.rank % 2 else [0, 1, 2, 3]
        for k in order:
            handles[k].wait()
        assert recorded.awaited == 8
        across = [c.label.partition(",")[0] for c in recorded.issued if c.dimension.endswith("across2")]
        return outputs, across

    for rank, (outputs, across) in enumerate(LoopbackWorld(4, timeout=5).run(several)):
        assert across == ["g0", "g1", "g2", "g3"]
        for k, output in enumerate(outputs):
            mean = torch.stack([elements(r, 4 * NUMEL, seed=k) for r in range(4)]).mean(0)
            torch.testing.assert_close(output, mean.view(4, NUMEL)[rank], rtol=0.0, atol=0.05)
