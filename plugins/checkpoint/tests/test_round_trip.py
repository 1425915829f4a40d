from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from powertrain.errors import CheckpointError
from powertrain.layout import Box
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain_checkpoint.memory import address_of
from powertrain_checkpoint.store import DirectoryStore

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip


def values_of(shape, dtype):
    return (torch.arange(math.prod(shape)) * 7 % 251).to(dtype).view(shape)


def flat_slice(name, tensor, rank, world_size):
    """The rank's even share of the flat tensor, as a sharded optimizer holds it."""
    count = tensor.numel()
    start, stop = count * rank // world_size, count * (rank + 1) // world_size
    return TensorSlice(name, tuple(tensor.shape), tensor.view(-1)[start:stop].clone(), start)


def snapshot(slices, **values):
    return Snapshot(tensors=slices, values=values, rank_values={})


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=4),
    savers=st.integers(1, 4),
    loaders=st.integers(1, 4),
    asynchronous=st.booleans(),
)
def test_any_world_size_loads_what_any_other_saved(on_ranks, tensors, savers, loaders, asynchronous):
    """Flat slices of any tensors, saved by any number of ranks, are bit-equal when any other number loads them."""
    named = {f"model/{i}": values_of(shape, dtype) for i, (shape, dtype) in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as root:

        def save(communicator):
            store = DirectoryStore(Path(root), communicator)
            slices = [flat_slice(name, t, communicator.rank, savers) for name, t in named.items()]
            store.save("a", snapshot(slices), asynchronous=asynchronous)
            store.close()

        def load(communicator):
            reader = DirectoryStore(Path(root), communicator).open()
            assert {name: (info.shape, info.dtype) for name, info in reader.tensors.items()} == {
                name: (tuple(t.shape), t.dtype) for name, t in named.items()
            }
            wanted = [flat_slice(name, t, communicator.rank, loaders) for name, t in named.items()]
            empty = [TensorSlice(w.name, w.shape, torch.zeros_like(w.tensor), w.start) for w in wanted]
            reader.read(empty)
            assert all(torch.equal(e.tensor, w.tensor) for e, w in zip(empty, wanted, strict=True))

        on_ranks(savers, save)
        on_ranks(loaders, load)


def tensor_parallel(name, tensor, column, columns, part, parts):
    """A flat share of a column block, as a sharded optimizer holds it under tensor parallelism."""
    rows, width = tensor.shape[0], tensor.shape[1] // columns
    box = Box((0, column * width), (rows, width))
    block = tensor[:, column * width : (column + 1) * width].reshape(-1)
    start, stop = block.numel() * part // parts, block.numel() * (part + 1) // parts
    return TensorSlice(name, tuple(tensor.shape), block[start:stop].clone(), start, box)


@pytest.mark.parametrize(("save_grid", "load_grid"), [*itertools.permutations([(2, 2), (4, 1), (1, 3), (1, 1)], 2)])
def test_tensor_parallel_blocks_load_under_another_grid(on_ranks, tmp_path, save_grid, load_grid):
    """Flat slices of column blocks, saved on one grid of (tensor, data) ranks, load bit-equal on another."""
    whole = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))

    def share(rank, grid):
        columns, parts = grid
        return tensor_parallel("model/w", whole, rank % columns, columns, rank // columns, parts)

    def save(communicator):
        DirectoryStore(tmp_path, communicator).save("a", snapshot([share(communicator.rank, save_grid)]))

    def load(communicator):
        want = share(communicator.rank, load_grid)
        got = TensorSlice(want.name, want.shape, torch.zeros_like(want.tensor), want.start, want.block)
        DirectoryStore(tmp_path, communicator).open("a").read([got])
        assert torch.equal(got.tensor, want.tensor)

    on_ranks(math.prod(save_grid), save)
    on_ranks(math.prod(load_grid), load)


def test_tensors_larger_than_a_band_and_a_block_are_cut_and_joined(on_ranks, tmp_path, monkeypatch):
    """Reads that span many bands and blocks, of rows and of columns, return the saved elements."""
    from powertrain_checkpoint import bands

    monkeypatch.setattr(bands, "SPAN", 4096)
    monkeypatch.setattr(bands, "LENGTH", 4096)
    whole = torch.arange(3 * 1000 * 1200, dtype=torch.float32).view(3, 1000, 1200)

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        store.save("a", snapshot([TensorSlice("t", (3, 1000, 1200), whole.view(-1))]))
        for box in (Box((0, 3, 5), (3, 50, 1100)), Box((1, 0, 1199), (2, 40, 1)), Box((2, 990, 0), (1, 10, 1200))):
            got = torch.zeros(box.numel)
            store.open().read([TensorSlice("t", (3, 1000, 1200), got, 0, box)])
            (a, b, c), (i, j, k) = box.offsets, box.sizes
            assert torch.equal(got.view(box.sizes), whole[a : a + i, b : b + j, c : c + k])

    on_ranks(1, work)


def test_replicas_are_written_once_and_by_different_ranks(on_ranks, tmp_path):
    """Tensors that every rank holds are written once in total, and every rank writes some of them."""

    def save(communicator):
        slices = [TensorSlice(f"model/{i}", (1000,), torch.full((1000,), float(i))) for i in range(8)]
        DirectoryStore(tmp_path, communicator).save("a", snapshot(slices))

    on_ranks(4, save)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "a").glob("*.safetensors"))]
    assert len(sizes) == 4
    assert all(8000 <= size < 9000 for size in sizes)


def test_reading_converts_element_types(on_ranks, tmp_path):
    """A bf16 checkpoint fills fp32 tensors and the other way round, as torch converts."""
    exact = torch.randn(100, generator=torch.Generator().manual_seed(1))

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        store.save("a", snapshot([TensorSlice("x", (100,), exact), TensorSlice("y", (100,), exact.bfloat16())]))
        x, y = torch.zeros(100, dtype=torch.bfloat16), torch.zeros(100)
        store.open().read([TensorSlice("x", (100,), x), TensorSlice("y", (100,), y)])
        assert torch.equal(x, exact.bfloat16())
        assert torch.equal(y, exact.bfloat16().float())

    on_ranks(1, work)


def test_shards_open_with_the_safetensors_library(on_ranks, tmp_path):
    """Any safetensors reader opens a shard and finds each chunk under its name and offsets."""
    tensors = {f"model/{d}": values_of((3, 4), d) for d in DTYPES}

    def save(communicator):
        slices = [flat_slice(name, t, communicator.rank, 2) for name, t in tensors.items()]
        DirectoryStore(tmp_path, communicator).save("a", snapshot(slices))

    on_ranks(2, save)
    rebuilt = {name: torch.zeros_like(t) for name, t in tensors.items()}
    for path in (tmp_path / "a").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                name, _, offsets = key.rpartition("|")
                chunk = file.get_tensor(key)
                index = tuple(slice(int(o), int(o) + n) for o, n in zip(offsets.split(","), chunk.shape, strict=True))
                rebuilt[name][index] = chunk
    assert all(torch.equal(rebuilt[name], t) for name, t in tensors.items())


def test_values_of_all_ranks_come_back(on_ranks, tmp_path):
    """Shared and per-rank JSON, infinities and deep nests included, is returned by every rank's reader."""
    values = {"step": 7, "loss": float("inf"), "nest": {"list": [1, None, True, "é"]}}

    def save(communicator):
        own = {"rank": communicator.rank, "text": "x" * communicator.rank}
        DirectoryStore(tmp_path, communicator).save("a", Snapshot(tensors=[], values=values, rank_values=own))

    def load(communicator):
        reader = DirectoryStore(tmp_path, communicator).open()
        return reader.tag, reader.values, list(reader.rank_values)

    on_ranks(3, save)
    own = [{"rank": rank, "text": "x" * rank} for rank in range(3)]
    assert on_ranks(2, load) == [("a", values, own)] * 2


def test_a_mutated_dictionary_does_not_reach_an_asynchronous_save(on_ranks, tmp_path):
    """What is saved is the state at the call, although values and tensors change right after."""

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        tensor, values = torch.ones(1 << 20), {"step": 1}
        store.save(
            "a",
            Snapshot(tensors=[TensorSlice("x", (1 << 20,), tensor)], values=values, rank_values={}),
            asynchronous=True,
        )
        tensor.zero_()
        values["step"] = 2
        assert store.wait() == ["a"]
        got = torch.zeros(1 << 20)
        reader = store.open()
        reader.read([TensorSlice("x", (1 << 20,), got)])
        assert reader.values == {"step": 1}
        assert bool((got == 1).all())

    on_ranks(1, work)


@pytest.mark.parametrize(
    "slices",
    [
        lambda rank: [TensorSlice("x", (10,), torch.zeros(4), 4 * rank)],
        lambda rank: [TensorSlice("x", (10,), torch.zeros(6), 4 * rank)],
        lambda rank: [TensorSlice("x", (10 + rank,), torch.zeros(10 + rank))],
        lambda rank: [TensorSlice("x", (10,), torch.zeros(5, dtype=[torch.float32, torch.float16][rank]), 5 * rank)],
    ],
    ids=["gap", "overlap", "shapes", "types"],
)
def test_slices_that_do_not_make_a_whole_are_refused_on_every_rank(outcomes, tmp_path, slices):
    """Gaps, overlaps and disagreement about shape or type are errors that name the tensor, and leave nothing behind."""

    def save(communicator):
        DirectoryStore(tmp_path, communicator).save("a", snapshot(slices(communicator.rank)))

    for error in outcomes(2, save):
        assert isinstance(error, CheckpointError)
        assert "x" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_gap_is_refused_in_a_world_of_one(outcomes, tmp_path):
    """A single rank that holds only a part of a tensor cannot save it."""

    def save(communicator):
        DirectoryStore(tmp_path, communicator).save("a", snapshot([TensorSlice("x", (10,), torch.zeros(9))]))

    (error,) = outcomes(1, save)
    assert isinstance(error, CheckpointError)
    assert "x" in str(error)


def test_an_unchanged_layout_is_planned_once(on_ranks, tmp_path):
    """The second save of the same layout exchanges fewer collectives than the first; a changed one plans anew."""

    def work(communicator):
        store, counts = DirectoryStore(tmp_path, communicator), []
        for tag, size in (("a", 10), ("b", 10), ("c", 12)):
            before = communicator.issued
            store.save(tag, snapshot([flat_slice("x", torch.ones(size), communicator.rank, 2)]))
            counts.append(communicator.issued - before)
        return counts

    for first, second, third in on_ranks(2, work):
        assert second < first == third


def test_staging_memory_is_reused(on_ranks, tmp_path):
    """Asynchronous saves of one size copy into the same host memory."""

    def work(communicator):
        store, places = DirectoryStore(tmp_path, communicator), set()
        for step in range(3):
            store.save(f"s{step}", snapshot([TensorSlice("x", (1000,), torch.ones(1000))]), asynchronous=True)
            places.add(address_of(store._staging._block))
        store.close()
        return len(places)

    assert on_ranks(1, work) == [1]
