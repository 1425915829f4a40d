from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resting import BLOCK, LateEngine, Rest, shrink

from powertrain.errors import ShardCorrupt
from powertrain.layout import Box
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain_checkpoint import reader, streaming
from powertrain_checkpoint.store import DirectoryStore

SHAPES = {"model/a": (40, 30, 17), "model/b": (5,), "model/c": (81, 97), "model/d": (), "optimizer/a/m": (40, 30, 17)}
MOST_SAVING = (streaming.AHEAD + 1) * BLOCK + 8 * BLOCK
MOST_LOADING = 4 * BLOCK


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Cut everything into small pieces: a loan is at most a few blocks."""
    shrink(monkeypatch)


def whole(name, dtype=torch.float32):
    """Return the global tensor: numbers that tell their place."""
    count = torch.Size(SHAPES[name]).numel()
    return (torch.arange(count) * 7 + len(name)).to(dtype)


def share(name, rank, size):
    """Return a rank's uneven part of a tensor."""
    count = torch.Size(SHAPES[name]).numel()
    step = -(-count // size) + 3
    return min(rank * step, count), min((rank + 1) * step, count)


def mixed(rest, communicator, *, fill, dtype=torch.float32, resting=lambda number: True):
    """Return this rank's slices, at rest or in memory, with their content or none."""
    found = []
    for number, name in enumerate(SHAPES):
        start, stop = share(name, communicator.rank, communicator.world_size)
        content = whole(name, dtype)[start:stop] if fill else torch.full((stop - start,), -1, dtype=dtype)
        if resting(number):
            rest.reserve(64 * (number + 1))  # slices do not begin where slots do
            slot = rest.put(torch.cat([torch.zeros(3, dtype=dtype), content]))
            item = TensorSlice.at_rest(name, SHAPES[name], dtype, stop - start, start, slot, 3 * content.element_size())
        else:
            item = TensorSlice(name, SHAPES[name], content.clone(), start)
        found.append(item)
    return found


def content(item):
    """Return a slice's elements, wherever they are."""
    loan = item.lend()
    result = loan.wait().clone()
    loan.release()
    return result


def shot(slices):
    return Snapshot(tensors=slices, values={}, rank_values={})


def open_rest(tmp_path, communicator, what):
    return Rest(tmp_path / f"swap-{what}-{communicator.world_size}-{communicator.rank}")


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("which", [lambda n: True, lambda n: n % 2 == 0, lambda n: n == 2], ids=["all", "some", "one"])
@pytest.mark.parametrize("size", [1, 2])
def test_files_are_those_of_state_in_memory(on_ranks, tmp_path, size, which, asynchronous):
    """What rests elsewhere is saved to the very same bytes, with little of it on loan at a time."""

    def work(communicator):
        rest = open_rest(tmp_path, communicator, "saved")
        store = DirectoryStore(tmp_path / "s", communicator, make_engine=LateEngine)
        store.save("memory", shot(mixed(rest, communicator, fill=True, resting=lambda n: False)))
        slices = mixed(rest, communicator, fill=True, resting=which)
        before = sum(item.tensor.numel() * 4 for item in slices)
        store.save("rest", shot(slices), asynchronous=asynchronous)
        # What rested was written before ``save`` returned: it may change now.
        assert rest.loaned == 0
        os.ftruncate(rest.file, 0)
        for item in slices:
            if item.slot is None:
                item.tensor.fill_(-5)
        store.wait()
        store.close()
        assert 0 < rest.peak <= MOST_SAVING < before

    on_ranks(size, work)
    for rank in range(size):
        name = f"rank-{rank:05d}.safetensors"
        assert (tmp_path / "s" / "rest" / name).read_bytes() == (tmp_path / "s" / "memory" / name).read_bytes()


@pytest.mark.parametrize("room", [0, 1 << 40])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2), (2, 3), (3, 2)])
def test_loads_to_rest_under_another_world_size(on_ranks, tmp_path, monkeypatch, before, after, room):
    """State at rest is filled piece by piece from whatever ranks saved, with little on loan at a time."""
    monkeypatch.setattr(reader, "spare_memory", lambda ranks: room)

    def save(communicator):
        rest = open_rest(tmp_path, communicator, "saved")
        DirectoryStore(tmp_path / "s", communicator).save("a", shot(mixed(rest, communicator, fill=True)))

    def load(communicator):
        rest = open_rest(tmp_path, communicator, "loaded")
        slices = mixed(rest, communicator, fill=False, resting=lambda n: n != 1)
        length = len(rest.content())
        store = DirectoryStore(tmp_path / "s", communicator, make_engine=LateEngine)
        store.open().read(slices)
        store.close()
        assert rest.loaned == 0
        assert rest.peak <= MOST_LOADING
        assert rest.stores > 3
        assert len(rest.content()) == length
        for item in slices:
            assert torch.equal(content(item), whole(item.name)[item.start : item.start + item.tensor.numel()])

    on_ranks(before, save)
    on_ranks(after, load)


def test_types_are_converted_on_the_way(on_ranks, tmp_path):
    """Saved in one type, at rest in another."""

    def work(communicator):
        rest = open_rest(tmp_path, communicator, "x")
        store = DirectoryStore(tmp_path / "s", communicator)
        store.save("a", shot(mixed(rest, communicator, fill=True)))
        slices = mixed(rest, communicator, fill=False, dtype=torch.bfloat16)
        store.open().read(slices)
        for item in slices:
            part = whole(item.name)[item.start : item.start + item.tensor.numel()]
            assert torch.equal(content(item), part.to(torch.bfloat16))

    on_ranks(2, work)


@pytest.mark.parametrize("damaged", [0, 1])
def test_damage_leaves_everything_at_rest_as_it_was(on_ranks, tmp_path, damaged):
    """A damaged block anywhere is found before anything is stored, on any rank."""

    def save(communicator):
        rest = open_rest(tmp_path, communicator, "saved")
        DirectoryStore(tmp_path / "s", communicator).save("a", shot(mixed(rest, communicator, fill=True)))

    def load(communicator):
        rest = open_rest(tmp_path, communicator, "loaded")
        slices = mixed(rest, communicator, fill=False)
        before = rest.content()
        with pytest.raises(ShardCorrupt):
            DirectoryStore(tmp_path / "s", communicator).open().read(slices)
        assert rest.content() == before
        assert rest.stores == rest.loaned == 0

    on_ranks(2, save)
    path = tmp_path / "s" / "a" / f"rank-{damaged:05d}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    on_ranks(2, load)


def test_a_failed_save_returns_every_loan(outcomes, tmp_path):
    """When the disk refuses in the midst, nothing stays on loan, and no other thread still looks at it."""

    def work(communicator):
        rest = open_rest(tmp_path, communicator, "x")
        engine = LateEngine(lambda what, path, stop: what == "write" and stop > 20 * BLOCK)
        store = DirectoryStore(tmp_path / "s", communicator, make_engine=lambda: engine)
        try:
            store.save("a", shot(mixed(rest, communicator, fill=True)))
        finally:
            assert rest.loaned == 0

    for error in outcomes(2, work):
        assert "was not saved" in str(error)


@settings(max_examples=25, deadline=None)
@given(
    saved=st.tuples(st.integers(0, 39), st.integers(0, 29)),
    wanted=st.tuples(st.integers(0, 39), st.integers(0, 29), st.integers(0, 16)),
)
def test_blocks_of_tensors_at_rest(on_ranks, tmp_path_factory, saved, wanted):
    """Parts of any block of a tensor, as tensor-parallel ranks hold, are filled where they rest."""
    root = tmp_path_factory.mktemp("blocks")
    name, shape = "model/a", SHAPES["model/a"]
    content_of = whole(name).view(shape)

    def work(communicator):
        store = DirectoryStore(root / "s", communicator)
        cut = saved[0] + 1
        halves = [(0, cut), (cut, 40)] if cut < 40 else [(0, 40)]
        parts = [
            TensorSlice(name, shape, content_of[a:b].reshape(-1), 0, Box((a, 0, 0), (b - a, 30, 17))) for a, b in halves
        ]
        store.save("a", shot(parts))
        box = Box(wanted, tuple(n - i for n, i in zip(shape, wanted, strict=True)))
        rest = open_rest(root, communicator, "x")
        slot = rest.reserve(box.numel * 4 + 8)
        os.ftruncate(rest.file, slot.nbytes)
        at_rest = TensorSlice(name, shape, torch.empty(box.numel, device="meta"), 0, box, slot, 8)
        store.open().read([at_rest])
        assert rest.peak <= MOST_LOADING
        (a, b, c), (i, j, k) = box.offsets, box.sizes
        assert torch.equal(content(at_rest), content_of[a : a + i, b : b + j, c : c + k].reshape(-1))

    on_ranks(1, work)
