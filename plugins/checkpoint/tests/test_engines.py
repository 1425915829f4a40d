from __future__ import annotations

import random
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resting import BLOCK, LateEngine, shrink

from powertrain.errors import CheckpointError, CheckpointWriteFailed, ShardCorrupt, ShardTruncated
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain_checkpoint import fetching, manifest, reader
from powertrain_checkpoint.dtypes import from_torch
from powertrain_checkpoint.image import Entry, header
from powertrain_checkpoint.store import DirectoryStore

KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.uint8)


@pytest.fixture
def small(monkeypatch):
    """Cut everything into small pieces, so that small tensors take every path."""
    shrink(monkeypatch)


def tensors(seed, counts):
    """Return tensors of these lengths, of several types, with random bytes."""
    draw = random.Random(seed)
    found = {}
    for number, count in enumerate(counts):
        dtype = KINDS[number % len(KINDS)]
        raw = bytearray(draw.randbytes(count * dtype.itemsize))
        found[f"t{number}"] = torch.frombuffer(raw, dtype=dtype) if count else torch.empty(0, dtype=dtype)
    return found


def slices(found):
    return [TensorSlice(name, tuple(tensor.shape), tensor) for name, tensor in found.items()]


def snapshot(found):
    return Snapshot(tensors=slices(found), values={}, rank_values={})


def expected(found):
    """Return the bytes of a file of whole tensors, by the format's words, and each tensor's checksums."""
    items = [(name, tensor) for name, tensor in found.items() if tensor.numel()]
    items.sort(key=lambda item: (-item[1].element_size(), item[0]))
    entries = [Entry(f"{name}|0", from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in items]
    content = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in items}
    sums = {
        name: [zlib.crc32(data[i : i + manifest.BLOCK]) for i in range(0, len(data), manifest.BLOCK)]
        for name, data in content.items()
    }
    return header(entries) + b"".join(content.values()), sums


def check(root, tag, found):
    whole, sums = expected(found)
    written = (root / tag / "rank-00000.safetensors").read_bytes()
    assert written == whole
    told = manifest.load(root / tag)
    assert {name: list(t.chunks[0].checksums) for name, t in told.tensors.items() if t.chunks} == sums
    assert told.files[0].header_checksum == zlib.crc32(whole[: told.files[0].header_size])


def same(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def round_trip(communicator, root, found, **options):
    """Save in both ways and load; every byte of the files and the tensors must be right."""
    store = DirectoryStore(root, communicator, **options)
    for tag, asynchronous in (("sync", False), ("async", True)):
        store.save(tag, snapshot(found), asynchronous=asynchronous)
        store.wait()
        check(root, tag, found)
        back = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
        store.open(tag).read(slices(back))
        assert all(same(back[name], found[name]) for name in found)
    store.close()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("room", [0, 40 << 20, 1 << 40])
def test_files_are_the_same_with_and_without_an_engine(on_ranks, tmp_path, monkeypatch, small, late, room):
    """Whatever moves the bytes, files are what the format says, checksums included, and load with any room to spare."""
    monkeypatch.setattr(reader, "spare_memory", lambda ranks: room)
    engine = LateEngine() if late else None
    found = tensors(1, [3 * BLOCK + 5, 1, 700, 2 * BLOCK, 50, 9 * BLOCK, 0, BLOCK - 1, 12345])
    on_ranks(1, lambda c: round_trip(c, tmp_path, found, make_engine=lambda: engine))
    assert engine is None or engine.closed


def test_large_tensors_pass_through_full_size_windows(on_ranks, tmp_path):
    """At the real sizes too: several blocks, windows and turns of the ring."""
    found = tensors(2, [7 << 20, 1000, 3, (9 << 20) + 1, 17])
    on_ranks(1, lambda c: round_trip(c, tmp_path, found, make_engine=LateEngine))


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.one_of(st.integers(0, 30), st.integers(0, 9 * BLOCK)), max_size=12), seed=st.integers(0, 99))
def test_any_sizes(on_ranks, tmp_path_factory, counts, seed):
    """Tensors of any sizes, in any order, are written as the format says and come back."""
    root = tmp_path_factory.mktemp("sizes")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        on_ranks(1, lambda c: round_trip(c, root, tensors(seed, counts), make_engine=LateEngine))


def test_the_plugins_are_asked_once_and_only_when_needed(on_ranks, tmp_path):
    """Making a store makes no engine; the first save does, and what follows uses the same one, until the end."""
    made = []

    def make():
        made.append(LateEngine())
        return made[-1]

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator, make_engine=make)
        assert store.tags() == []
        assert not made
        for tag in "ab":
            store.save(tag, snapshot(tensors(3, [10])))
        store.open().read([])
        assert len(made) == 1
        store.close()
        assert made[0].closed

    on_ranks(1, work)


def world(value, communicator):
    """Return a rank's share of a tensor of two, full of a value."""
    part = torch.full((5 * BLOCK,), float(value))
    start = 5 * BLOCK * communicator.rank
    return [TensorSlice("x", (5 * BLOCK * communicator.world_size,), part, start)]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("what", ["write", "resize", "sync"])
def test_an_engine_that_fails_leaves_the_old_checkpoint(
    outcomes, on_ranks, tmp_path, small, what, failing, asynchronous
):
    """A transfer that fails, a full disk or a failed sync on one rank: all raise with file and bytes, nothing stays."""

    def fail(doing, path, stop):
        return doing == what and f"rank-{failing:05d}" in path and (what != "write" or stop > 9 * BLOCK)

    def good(communicator):
        store = DirectoryStore(tmp_path, communicator, make_engine=LateEngine)
        store.save("good", Snapshot(tensors=world(1, communicator), values={}, rank_values={}))
        store.close()

    def bad(communicator):
        engine = LateEngine(fail)
        store = DirectoryStore(tmp_path, communicator, make_engine=lambda: engine)
        try:
            shot = Snapshot(tensors=world(2, communicator), values={}, rank_values={})
            store.save("bad", shot, asynchronous=asynchronous)
            store.wait()
        finally:
            store.close()
            assert all(file.closed for file in engine.files)

    on_ranks(2, good)
    for error in outcomes(2, bad):
        assert isinstance(error, CheckpointWriteFailed)
        assert f"rank-{failing:05d}.safetensors" in str(error)
        if what != "sync":
            assert "bytes" in error.expected
        assert "bytes free" in error.found
    assert not [path for path in tmp_path.rglob(f"rank-{failing:05d}.safetensors") if "good" not in str(path)]

    def load(communicator):
        found = world(-1, communicator)
        DirectoryStore(tmp_path, communicator).open().read(found)
        assert bool((found[0].tensor == 1).all())

    on_ranks(2, load)


def test_a_short_read_changes_nothing(on_ranks, tmp_path, small):
    """A file that ends early while it is read is named; targets stay as they were on every rank."""

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator, make_engine=LateEngine)
        store.save("a", Snapshot(tensors=world(1, communicator), values={}, rank_values={}))
        opened = store.open()
        communicator.barrier().wait()
        path = tmp_path / "a" / "rank-00001.safetensors"
        if communicator.rank == 0:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - 5)
        communicator.barrier().wait()
        found = world(-1, communicator)
        with pytest.raises(ShardTruncated, match="rank-00001"):
            opened.read(found)
        assert bool((found[0].tensor == -1).all())

    on_ranks(2, work)


@pytest.mark.parametrize("room", [0, 1 << 40])
def test_what_changes_between_the_passes_is_found(on_ranks, tmp_path, monkeypatch, small, room):
    """What is read a second time is verified a second time; what was kept is not read again."""
    monkeypatch.setattr(reader, "spare_memory", lambda ranks: room)
    path = tmp_path / "a" / "rank-00000.safetensors"
    verify = fetching.Fetcher.verify

    def damaged(self):
        verify(self)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    monkeypatch.setattr(fetching.Fetcher, "verify", damaged)

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator, make_engine=LateEngine)
        store.save("a", Snapshot(tensors=world(1, communicator), values={}, rank_values={}))
        found = world(-1, communicator)
        if room:
            store.open().read(found)
            assert bool((found[0].tensor == 1).all())
        else:
            with pytest.raises(ShardCorrupt):
                store.open().read(found)

    on_ranks(1, work)


def test_an_engine_that_cannot_read_is_told_by_every_rank(outcomes, tmp_path):
    """A read that fails on one rank is a CheckpointError with its words on all."""

    def work(communicator):
        store = DirectoryStore(
            tmp_path,
            communicator,
            make_engine=lambda: LateEngine(lambda what, path, _: what == "read" and "1.s" in path),
        )
        store.save("a", Snapshot(tensors=world(1, communicator), values={}, rank_values={}))
        store.open().read(world(-1, communicator))

    for error in outcomes(2, work):
        assert type(error) is CheckpointError
        assert "rank-00001.safetensors failed" in str(error)
