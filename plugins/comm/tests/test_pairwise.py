"""Gather and reduce-scatter by direct exchanges: the same bits, whatever is in place, in flight or late."""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.environment import Rank
from powertrain.errors import CommunicationError
from powertrain.kernels.sums import BLOCK, combine
from powertrain.mesh import Mesh
from powertrain.roles.communicator import Collective, Done, Handles
from powertrain_comm.pairwise import LONG, Exchange
from powertrain_comm.pool import GRAIN, KEPT, BufferPool
from powertrain_comm.transport import TorchCommunicator
from powertrain_comm.watchdog.records import Ledger

SIZES = (1, 3, 1001, BLOCK + 1)
LARGE = LONG + 5
KINDS = ("float32", "float64", "bfloat16", "float16", "int8", "uint8", "int64")


def connect(**sizes):
    """Return a communicator of this process's rank."""
    rank = Rank.from_environment()
    mesh = Mesh.build(rank.world_size, rank.index, sizes)
    return TorchCommunicator("gloo", torch.device("cpu"), mesh, rank, 30.0)


def numbers(rank, count, dtype, seed=0):
    """Return numbers of one rank whose sum depends on the order of additions, where the type can tell."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if not dtype.is_floating_point:
        return torch.randint(0, 100, (count,), generator=generator).to(dtype)
    scale = 10.0 ** torch.randint(-3, 3, (count,), generator=generator)
    return (torch.randn(count, generator=generator, dtype=torch.float64) * scale).to(dtype)


def reference(terms, reduction):
    """Reduce from the first term to the last: narrow types in float32, rounded once."""
    dtype = terms[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = terms[0].to(wide, copy=True)
    for term in terms[1:]:
        if reduction in ("sum", "mean"):
            total = total + term.to(wide)
        else:
            total = (torch.maximum if reduction == "max" else torch.minimum)(total, term.to(wide))
    return (total / len(terms) if reduction == "mean" else total).to(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def bit_equal(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(bits(found), bits(expected)), f"{found} in place of {expected}"


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 5), st.data())
def test_terms_are_combined_in_their_order(count, data):
    """A reduction adds from the first term to the last, rounds narrow types once, and touches only the output."""
    dtype = getattr(torch, data.draw(st.sampled_from(KINDS)))
    floats = dtype.is_floating_point
    reduction = data.draw(st.sampled_from(["sum", "max", "min"] + ["mean"] * floats))
    size = data.draw(st.sampled_from(SIZES))
    me = data.draw(st.integers(0, count - 1))
    in_place = data.draw(st.booleans())
    terms = [numbers(index, size, dtype) for index in range(count)]
    expected = reference(terms, reduction)
    kept = [term.clone() for term in terms]
    output = terms[me] if in_place else torch.empty_like(terms[me])
    combine(output, terms, reduction)
    bit_equal(output, expected)
    for term, before in zip(terms, kept, strict=True):
        if term is not output:
            bit_equal(term, before)


def exchange_everything(kind):
    dtype = getattr(torch, kind)
    comm = connect()
    n, me = comm.world_size, comm.rank
    for size in (*SIZES, LARGE):
        everything = torch.cat([numbers(r, size, dtype) for r in range(n)])
        apart, output = numbers(me, size, dtype), torch.zeros(n * size, dtype=dtype)
        comm.all_gather(output, apart).wait()
        bit_equal(output, everything)
        bit_equal(apart, numbers(me, size, dtype))
        output = torch.zeros(n * size, dtype=dtype)
        own = output[me * size : (me + 1) * size]
        own.copy_(apart)
        comm.all_gather(output, own).wait()
        bit_equal(output, everything)

        wholes = [numbers(r, n * size, dtype, seed=1) for r in range(n)]
        pieces = [whole[me * size : (me + 1) * size] for whole in wholes]
        for reduction in ["sum", "max", "min"] + ["mean"] * dtype.is_floating_point:
            expected = reference(pieces, reduction)
            given_, output = wholes[me].clone(), torch.zeros(size, dtype=dtype)
            comm.reduce_scatter(output, given_, reduction=reduction).wait()
            bit_equal(output, expected)
            bit_equal(given_, wholes[me])
            comm.reduce_scatter(given_[me * size : (me + 1) * size], given_, reduction=reduction).wait()
            bit_equal(given_[me * size : (me + 1) * size], expected)
            given_[me * size : (me + 1) * size] = pieces[me]
            bit_equal(given_, wholes[me])
    comm.close()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_results_are_exact_in_every_form(ranks, n):
    """In place or not, in every type, reduction and odd size: the bits of a reduction in order of index."""
    for kind in KINDS:
        ranks(n, exchange_everything, kind)


def many_in_flight(repetitions):
    comm = connect()
    n, me = comm.world_size, comm.rank
    sizes = [1 + 997 * k for k in range(10)]
    order = random.Random(me)
    pieces = [numbers(me, size, torch.float32, seed=2) for size in sizes]
    wholes = [numbers(me, n * size, torch.bfloat16 if k % 2 else torch.float32, 3) for k, size in enumerate(sizes)]
    first = None
    for _ in range(repetitions):
        gathered = [torch.zeros(n * size) for size in sizes]
        scattered = [torch.zeros(size, dtype=whole.dtype) for size, whole in zip(sizes, wholes, strict=True)]
        total, message = torch.ones(5) * me, torch.zeros(4)
        handles = []
        for k in range(len(sizes)):
            handles.append(comm.all_gather(gathered[k], pieces[k]))
            if k == 4:
                handles.append(comm.send(torch.full((4,), float(me)), (me + 1) % n, "data"))
                handles.append(comm.receive(message, (me - 1) % n, "data"))
                handles.append(comm.all_reduce(total))
            handles.append(comm.reduce_scatter(scattered[k], wholes[k]))
        order.shuffle(handles)
        for handle in handles:
            handle.wait()
        assert message.tolist() == [float((me - 1) % n)] * 4
        assert total.tolist() == [n * (n - 1) / 2] * 5
        found = [bits(tensor) for tensor in (*gathered, *scattered)]
        first = found if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    for k, size in enumerate(sizes):
        bit_equal(gathered[k], torch.cat([numbers(r, size, torch.float32, seed=2) for r in range(n)]))
        parts = [numbers(r, n * size, wholes[k].dtype, 3)[me * size : (me + 1) * size] for r in range(n)]
        bit_equal(scattered[k], reference(parts, "sum"))
    comm.close()


@pytest.mark.parametrize(("n", "repetitions"), [(2, 100), (4, 20)])
def test_twenty_at_once_give_the_same_bits_every_time(ranks, n, repetitions):
    """Twenty exchanges, a message of the user and a reduction at once, waited for in any order, never mix."""
    ranks(n, many_in_flight, repetitions)


def issued_together():
    comm = connect()
    n, me = comm.world_size, comm.rank
    outputs = [torch.zeros(n * size, dtype=torch.int8) for size in (3, 5)]
    scattered = torch.zeros(7)

    def gather(output):
        source = numbers(me, output.numel() // n, torch.int8)
        return Collective(operation="all_gather", dimension="data", input=source, output=output)

    source = numbers(me, n * 7, torch.float32)
    scatter = Collective(operation="reduce_scatter", dimension="data", input=source, output=scattered, reduction="mean")
    handle = comm.issue_together([gather(outputs[0]), scatter, gather(outputs[1])])
    assert not handle.done()
    handle.wait()
    assert handle.done()
    handle.wait()
    for output in outputs:
        bit_equal(output, torch.cat([numbers(r, output.numel() // n, torch.int8) for r in range(n)]))
    parts = [numbers(r, n * 7, torch.float32)[7 * me : 7 * me + 7] for r in range(n)]
    bit_equal(scattered, reference(parts, "mean"))
    comm.close()


def test_exchanges_issued_together_are_those_issued_alone(ranks):
    """Several exchanges issued as one give what each gives alone; waiting twice changes nothing."""
    ranks(3, issued_together)


def odd_uses():
    comm = connect(tensor=2)
    me = comm.rank
    gradient = torch.ones(4, requires_grad=True)
    output = torch.zeros(8, requires_grad=True)
    comm.all_gather(output, gradient).wait()
    assert output.tolist() == [1.0] * 8
    comm.all_gather(torch.empty(0), torch.empty(0)).wait()
    comm.reduce_scatter(torch.empty(0), torch.empty(0)).wait()
    square = torch.full((2, 2), float(me))
    rows = torch.zeros(4, 2)
    comm.all_gather(rows, square, "tensor").wait()
    assert rows.tolist() == [[me // 2 * 2.0] * 2] * 2 + [[me // 2 * 2.0 + 1] * 2] * 2
    with pytest.raises(ValueError, match=r"3 of torch\.float32 do not fit 5 of torch\.float32"):
        comm.all_gather(torch.zeros(5), torch.zeros(3))
    with pytest.raises(ValueError, match=r"2 of torch\.float32 do not fit 4 of torch\.bfloat16"):
        comm.reduce_scatter(torch.zeros(2), torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(CommunicationError, match="all_gather of 'w' failed"):
        comm.all_gather(torch.zeros(2, 4).t(), torch.zeros(4), label="w")
    comm.barrier().wait()
    comm.close()


def test_odd_tensors_are_carried_or_refused(ranks):
    """Parameters, empty and shaped tensors are carried; lengths, types and layouts that do not fit are refused."""
    ranks(4, odd_uses)


def is_not_done():
    comm = connect()
    output = torch.zeros(2)
    handle = comm.all_gather(output, torch.ones(1))
    comm.barrier().wait()
    time.sleep(0.2)
    before = handle.done()
    handle.wait()
    comm.close()
    return before, handle.done(), output.tolist()


def test_an_exchange_is_done_once_it_was_waited_for(ranks):
    """``done`` claims nothing before ``wait``; the watchdog, told so, takes no such exchange for a stalled one."""
    assert ranks(2, is_not_done) == [(False, True, [1.0, 1.0])] * 2


class Work:
    """Stands for a send or receive of torch."""

    def __init__(self, error=None):
        self.waited, self.error = 0, error

    def wait(self):
        self.waited += 1
        if self.error is not None:
            raise self.error


COLLECTIVE = Collective(operation="all_gather", dimension="data", label="w")


def test_every_message_is_waited_for():
    """``wait`` waits for each send and receive, then finishes, once."""
    works, finished = [Work() for _ in range(6)], []
    handle = Exchange(works, COLLECTIVE, 0, lambda: finished.append([work.waited for work in works]))
    assert not handle.done()
    handle.wait()
    handle.wait()
    assert finished == [[1] * 6]
    assert handle.done()


def test_a_failed_exchange_stays_failed():
    """An error is that of the collective, is raised again, and nothing is finished or freed after it."""
    works = [Work(), Work(RuntimeError("Connection closed by peer"))]
    handle = Exchange(works, COLLECTIVE, 3, lambda: pytest.fail("finished"))
    for _ in range(2):
        with pytest.raises(CommunicationError, match="all_gather of 'w' lost the connection") as caught:
            handle.wait()
        assert caught.value.code == "PT504"
    assert not handle.done()
    assert handle._works == works


def test_the_pool_lends_each_buffer_to_one():
    """What is lent is not lent again before it is given back; then it is, for sizes down to half of its own."""
    pool = BufferPool()
    first, second = pool.take(5000), pool.take(5000)
    assert first.data_ptr() != second.data_ptr()
    assert first.numel() == 2 * GRAIN
    place = first.data_ptr()
    pool.give(first)
    assert pool.take(8000).data_ptr() == place
    pool.give(first)
    assert pool.take(1).data_ptr() == place
    pool.give(pool.take(3 * GRAIN))
    assert pool.take(1).numel() == GRAIN  # three times as much would be a waste
    pool.clear()
    assert pool.take(3 * GRAIN).numel() == 3 * GRAIN


def test_the_pool_keeps_little():
    """Idle buffers together hold no more than the limit, the last used ones; a larger one is never kept."""
    pool = BufferPool()
    lent = [pool.take(KEPT // 4) for _ in range(6)]
    for buffer in lent:
        pool.give(buffer)
    pool.give(pool.take(2 * KEPT))
    places = {pool.take(KEPT // 4).data_ptr() for _ in range(4)}
    assert places == {buffer.data_ptr() for buffer in lent[2:]}


def test_the_watchdog_concludes_nothing_from_an_exchange_that_nobody_waits_for():
    """A prefetched exchange is passed over until somebody waits; its time counts from then on."""
    ledger = Ledger()
    prefetched = ledger.begin(COLLECTIVE)
    prefetched.pend(Handles([Done(), Exchange([Work()], COLLECTIVE, 0, None)]))
    prefetched.started -= 100
    assert ledger.oldest() is None
    assert not ledger.state()["records"][-1]["waiting"]
    later = ledger.begin(Collective(operation="barrier", dimension="data"))
    assert ledger.oldest() is later
    prefetched.expect()
    assert ledger.oldest() is prefetched
    assert time.monotonic() - prefetched.started < 50
    assert ledger.state()["records"][0]["waiting"]
