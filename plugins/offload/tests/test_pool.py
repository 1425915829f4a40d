"""Memory for transfers: borrowed, given back, used again, and never much more than allowed."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.errors import TransferFailed
from powertrain_offload.pool import Pool

KIB = 1024


class Memory:
    """Makes memory, and counts it."""

    def __init__(self):
        self.made = []

    def buffer(self, nbytes):
        self.made.append(nbytes)
        return memoryview(bytearray(nbytes))


class Write:
    """A write under way until it is awaited, or until ``over`` is set."""

    def __init__(self, error=None):
        self.over, self.waited, self.error = False, False, error

    def wait(self):
        self.over = self.waited = True
        if self.error is not None:
            raise self.error

    def done(self):
        return self.over


def failed():
    return TransferFailed("writing to /x failed: EIO", where="/x, byte 0", expected="10 bytes", found="0 bytes")


@pytest.fixture
def memory():
    return Memory()


@pytest.fixture
def pool(memory):
    return Pool(memory, 256 * KIB)


def test_a_buffer_is_as_large_as_asked_and_one_memory(pool):
    for nbytes in (0, 1, 64 * KIB, 64 * KIB + 1):
        buffer = pool.borrow(nbytes)
        assert buffer.nbytes >= max(nbytes, 1)
        assert buffer.nbytes % (64 * KIB) == 0
        buffer.view[0] = 9
        assert buffer.tensor[0].item() == 9
        assert buffer.tensor.dtype == torch.uint8
        pool.give_back(buffer)


def test_what_came_back_is_lent_again(pool, memory):
    first = pool.borrow(100 * KIB)
    pool.give_back(first)
    assert pool.borrow(90 * KIB) is first
    assert pool.borrow(90 * KIB) is not first
    assert memory.made == [128 * KIB, 128 * KIB]


def test_the_smallest_that_fits_is_taken_and_none_that_is_far_too_large(pool, memory):
    buffers = [pool.borrow(size * 64 * KIB) for size in (2, 1)]
    for buffer in buffers:
        pool.give_back(buffer)
    assert pool.borrow(10) is buffers[1]
    assert pool.borrow(64 * KIB) is buffers[0]
    large = Pool(memory, 10**9)
    large.give_back(large.borrow(10 * 64 * KIB))
    assert large.borrow(10).nbytes == 64 * KIB


def test_a_write_that_is_over_gives_its_buffer_back(pool):
    buffer, write = pool.borrow(64 * KIB), Write()
    pool.leaves(write, buffer)
    assert pool.borrow(64 * KIB) is not buffer
    write.over = True
    assert pool.borrow(64 * KIB) is buffer


def test_at_the_limit_a_borrower_waits_for_the_oldest_write(pool, memory):
    """No more memory is made while writes under way will give some back."""
    writes = [Write() for _ in range(4)]
    buffers = [pool.borrow(64 * KIB) for _ in range(4)]
    for write, buffer in zip(writes, buffers, strict=True):
        pool.leaves(write, buffer)
    assert pool.borrow(64 * KIB) is buffers[0]
    assert [write.waited for write in writes] == [True, False, False, False]
    assert len(memory.made) == 4


def test_beyond_the_limit_memory_is_lent_but_not_kept(pool, memory):
    """What many leases need at once is there; afterwards it is given up."""
    buffers = [pool.borrow(64 * KIB) for _ in range(10)]
    assert len({id(buffer) for buffer in buffers}) == 10
    for buffer in buffers:
        pool.give_back(buffer)
    again = [pool.borrow(64 * KIB) for _ in range(4)]
    assert len(memory.made) == 10
    assert all(buffer in buffers for buffer in again)
    pool.borrow(64 * KIB)
    assert len(memory.made) == 11


def test_idle_memory_of_another_size_makes_room(pool, memory):
    """Buffers that fit nothing that is asked for now do not stay beside those that do."""
    pool.give_back(pool.borrow(256 * KIB))
    pool.give_back(pool.borrow(64 * KIB))
    assert pool.borrow(250 * KIB).nbytes == 256 * KIB
    assert memory.made == [256 * KIB, 64 * KIB, 256 * KIB]


@pytest.mark.parametrize("call", ["borrow", "settle"])
def test_a_write_that_failed_is_told_at_the_next_call(pool, call):
    """Whoever comes next hears of it, once, and the buffer is not lost."""
    buffer, write = pool.borrow(64 * KIB), Write(failed())
    pool.leaves(write, buffer)
    write.over = True
    with pytest.raises(TransferFailed, match="EIO"):
        pool.borrow(10) if call == "borrow" else pool.settle()
    assert pool.borrow(10) is buffer
    pool.settle()


def test_settling_waits_for_every_write(pool):
    writes = [Write() for _ in range(3)]
    for write in writes:
        pool.leaves(write, pool.borrow(10))
    pool.settle()
    assert all(write.waited for write in writes)


def test_dropping_lets_go(pool, memory):
    buffer = pool.borrow(10)
    pool.give_back(buffer)
    pool.drop()
    assert pool.borrow(10) is not buffer


STEPS = st.lists(st.tuples(st.sampled_from(["borrow", "borrow", "back", "leaves", "over"]), st.integers(0, 2**16)))


@settings(max_examples=100, deadline=None)
@given(steps=STEPS)
def test_no_buffer_is_lent_twice_and_idle_memory_stays_within_the_limit(steps):
    memory, limit = Memory(), 512 * KIB
    pool, lent, leaving = Pool(memory, limit), [], []
    for what, chance in steps:
        if what == "borrow":
            buffer = pool.borrow(chance * 4)
            assert all(buffer is not other for other in lent)
            leaving = [(write, other) for write, other in leaving if not (write.over and other is buffer)]
            assert all(buffer is not other for _, other in leaving), "memory that is being written out was lent"
            lent.append(buffer)
        elif what == "over" and leaving:
            leaving[chance % len(leaving)][0].over = True
        elif lent and what in ("back", "leaves"):
            buffer = lent.pop(chance % len(lent))
            if what == "back":
                pool.give_back(buffer)
            else:
                leaving.append((Write(), buffer))
                pool.leaves(*leaving[-1])
    pool.settle()
    for buffer in lent:
        pool.give_back(buffer)
    assert sum(buffer.nbytes for buffer in pool._free) <= limit


def test_threads_share_it(pool):
    """No buffer is in two hands."""
    hands, errors = set(), []

    def work():
        try:
            for _ in range(200):
                buffer = pool.borrow(1000)
                assert id(buffer) not in hands
                hands.add(id(buffer))
                hands.remove(id(buffer))
                pool.give_back(buffer)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
