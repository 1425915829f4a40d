from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch

import powertrain_checkpoint.store
from powertrain.errors import CheckpointError, CheckpointWriteFailed
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain_checkpoint import directory, manifest, shard
from powertrain_checkpoint.plugin import local_directory
from powertrain_checkpoint.saving import Save
from powertrain_checkpoint.staging import Staging
from powertrain_checkpoint.store import DirectoryStore

SIZE = 3000


def snapshot(rank, world_size, value):
    """Every rank's share of one tensor full of ``value``, and the value itself."""
    start, stop = SIZE * rank // world_size, SIZE * (rank + 1) // world_size
    part = torch.full((stop - start,), float(value))
    return Snapshot(tensors=[TensorSlice("x", (SIZE,), part, start)], values={"step": value}, rank_values={})


def save(store, communicator, tag, value, **options):
    store.save(tag, snapshot(communicator.rank, communicator.world_size, value), **options)


def content(store, tag=None):
    """Return the value that the whole checkpoint holds."""
    reader = store.open(tag)
    tensor = torch.zeros(SIZE)
    reader.read([TensorSlice("x", (SIZE,), tensor)])
    assert bool((tensor == reader.values["step"]).all())
    return reader.values["step"]


def refuse_writing(monkeypatch, ranks, number=errno.ENOSPC):
    """Make the disk refuse the shards of ``ranks``."""
    write = shard.write

    def refuse(path, *arguments):
        if any(f"rank-{rank:05d}" in path.name for rank in ranks):
            path.write_bytes(b"half")
            raise OSError(number, os.strerror(number), str(path))
        return write(path, *arguments)

    monkeypatch.setattr(shard, "write", refuse)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tags_are_listed_oldest_first(on_ranks, tmp_path, asynchronous):
    """Tags come in the order of saving, whatever their names and the clock; a tag saved again is the newest."""

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        for value, tag in enumerate(("b", "c", "a", "b")):
            save(store, communicator, tag, value, asynchronous=asynchronous)
        store.close()
        return store.tags(), content(store)

    assert on_ranks(2, work) == [(["c", "a", "b"], 3)] * 2


def test_a_clock_that_goes_back_does_not_change_the_order(on_ranks, tmp_path, monkeypatch):
    """A save made after the clock was set back is still the newest."""

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        save(store, communicator, "a", 1)
        monkeypatch.setattr(time, "time", lambda: 1000.0)
        save(store, communicator, "b", 2)
        return store.tags()

    assert on_ranks(1, work) == [["a", "b"]]


def test_only_complete_checkpoints_are_listed(on_ranks, tmp_path):
    """Files, empty directories and unfinished saves beside the checkpoints are no tags."""

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        save(store, communicator, "a", 1)
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "empty").mkdir()
        return store.tags()

    assert on_ranks(1, work) == [["a"]]


def test_a_checkpoint_holds_shards_and_a_manifest_only(on_ranks, tmp_path):
    """Nothing of the work on a save remains beside or in the checkpoint, saved once or twice."""

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        save(store, communicator, "a", 1)
        once = sorted(path.name for path in (tmp_path / "a").iterdir())
        communicator.barrier().wait()
        save(store, communicator, "a", 2)
        return once

    once, _ = on_ranks(2, work)
    assert once == [manifest.FILE_NAME, "rank-00000.safetensors", "rank-00001.safetensors"]
    assert len(list((tmp_path / "a").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_replacing_a_tag_keeps_a_complete_checkpoint_at_every_moment(on_ranks, tmp_path, monkeypatch):
    """Between any two changes to the file system, the tag that is saved again loads, as the old or as the new."""
    seen = []

    def work(communicator):
        store, other = DirectoryStore(tmp_path, communicator), DirectoryStore(tmp_path, communicator)
        save(store, communicator, "a", 1)

        def watched(original):
            def step(*arguments, **options):
                seen.append(content(other, "a"))
                result = original(*arguments, **options)
                seen.append(content(other, "a"))
                return result

            return step

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
                patch.setattr(Path, name, watched(getattr(Path, name)))
            save(store, communicator, "a", 2)

    on_ranks(1, work)
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}
    assert len(seen) > 8


def test_prune_keeps_the_newest(on_ranks, tmp_path):
    """Pruning deletes the oldest complete checkpoints and nothing else."""

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        for value in range(4):
            save(store, communicator, f"s{value}", value)
        communicator.barrier().wait()
        if communicator.rank == 0:
            (tmp_path / "notes").mkdir()
        store.prune(2)
        return store.tags()

    assert on_ranks(2, work) == [["s2", "s3"]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "s2", "s3"]


def test_an_asynchronous_save_waits_for_the_one_before(on_ranks, tmp_path, monkeypatch):
    """A second asynchronous save starts to write only when the first has ended, and poll reports each once."""
    write, entered, leave, running = shard.write, threading.Event(), threading.Event(), []

    def slow(*arguments):
        assert not running
        running.append(1)
        entered.set()
        assert leave.wait(60)
        running.clear()
        return write(*arguments)

    monkeypatch.setattr(shard, "write", slow)

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        save(store, communicator, "a", 1, asynchronous=True)
        assert entered.wait(60)
        assert store.poll() == []
        assert store.tags() == []
        leave.set()
        save(store, communicator, "b", 2, asynchronous=True)
        first = store.poll()
        return first + store.wait(), store.poll()

    assert on_ranks(1, work) == [(["a", "b"], [])]


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_fails_the_save_on_every_rank(outcomes, on_ranks, tmp_path, monkeypatch, failing, asynchronous):
    """When one rank cannot write, all raise CheckpointWriteFailed with path and sizes; the older one still loads."""

    def before(communicator):
        save(DirectoryStore(tmp_path, communicator), communicator, "good", 1)

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        save(store, communicator, "bad", 2, asynchronous=asynchronous)
        store.wait()

    on_ranks(3, before)
    with monkeypatch.context() as patch:
        refuse_writing(patch, [failing])
        for error in outcomes(3, work):
            assert isinstance(error, CheckpointWriteFailed)
            assert f"rank {failing}" in str(error)
            assert "No space left on device" in str(error)
            assert f"rank-{failing:05d}.safetensors" in str(error)
            assert "bytes free" in str(error)

    def after(communicator):
        store = DirectoryStore(tmp_path, communicator)
        assert store.tags() == ["good"]
        assert content(store) == 1
        communicator.barrier().wait()
        save(store, communicator, "bad", 3)
        return store.tags(), content(store)

    assert on_ranks(3, after) == [(["good", "bad"], 3)] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]


def test_a_failed_save_leaves_no_bulk_behind(outcomes, tmp_path, monkeypatch):
    """The rank whose disk is full gives back what it had written of the shard at once."""
    refuse_writing(monkeypatch, [0])
    outcomes(1, lambda communicator: save(DirectoryStore(tmp_path, communicator), communicator, "a", 1))
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("late", [0, 1])
def test_all_ranks_learn_of_the_end_in_the_same_poll(on_ranks, tmp_path, monkeypatch, failing, late):
    """A save that ended on one rank is told, or raised, only once it has ended on all, on all at once."""
    if failing:
        refuse_writing(monkeypatch, [1 - late])
    run, early, held = Save.run, threading.Event(), threading.Event()

    def slow(save, buffers):
        try:
            run(save, buffers)
        finally:
            if save.rank == late:
                assert held.wait(60)
            else:
                early.set()

    monkeypatch.setattr(Save, "run", slow)

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        save(store, communicator, "a", 1, asynchronous=True)
        assert early.wait(60)
        while store._background.ended() != (communicator.rank != late):
            time.sleep(0.001)
        assert [store.poll(), store.poll()] == [[], []]
        communicator.barrier().wait()
        held.set()
        polls = 0
        try:
            while not store.poll():
                polls += 1
        except CheckpointWriteFailed:
            assert failing
        else:
            assert not failing
        issued = communicator.issued
        assert store.poll() == []
        assert communicator.issued == issued
        return polls

    first, second = on_ranks(2, work)
    assert first == second


def test_a_copy_that_fails_is_told_by_every_rank(outcomes, tmp_path, monkeypatch):
    """Where one rank has no memory for an asynchronous save, all ranks raise when they next ask."""
    copy = Staging.copy

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        if communicator.rank == 1:
            store._staging.copy = lambda parts: copy(None, parts)
        save(store, communicator, "a", 1, asynchronous=True)
        store.wait()

    for error in outcomes(2, work):
        assert isinstance(error, CheckpointWriteFailed)
        assert "rank 1" in str(error)


def test_an_unasked_failure_is_raised_by_the_next_save_on_every_rank(outcomes, tmp_path, monkeypatch):
    """A failed asynchronous save that nobody polled is raised by the next save or by close, never dropped."""

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        save(store, communicator, "a", 1, asynchronous=True)
        try:
            save(store, communicator, "b", 2)
        except CheckpointWriteFailed:
            save(store, communicator, "c", 3, asynchronous=True)
            store.close()

    refuse_writing(monkeypatch, [1])
    for error in outcomes(2, work):
        assert isinstance(error, CheckpointWriteFailed)
        assert "checkpoint c was not saved" in str(error)


def test_a_failure_that_nobody_can_ask_about_is_told(tmp_path):
    """A program that ends without closing its store says on stderr that its last save failed."""
    script = f"""
import torch
from pathlib import Path
from powertrain.mesh import Mesh
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain.roles.communicator import SingleProcess
from powertrain_checkpoint import shard
from powertrain_checkpoint.store import DirectoryStore

def write(*arguments):
    raise OSError(28, "No space left on device")

shard.write = write
store = DirectoryStore(Path({str(tmp_path)!r}), SingleProcess(Mesh.build(1, 0), torch.device("cpu")))
snapshot = Snapshot(tensors=[TensorSlice("x", (3,), torch.ones(3))], values={{}}, rank_values={{}})
store.save("last", snapshot, asynchronous=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "checkpoint last was not saved" in done.stderr
    assert "No space left on device" in done.stderr


def test_a_silent_rank_is_given_up(outcomes, tmp_path, monkeypatch):
    """A rank that never reports makes the others raise once their patience ends, naming it."""
    write, over = shard.write, threading.Event()

    def hang(path, *arguments):
        if "rank-00001" in path.name:
            over.wait(60)
        return write(path, *arguments)

    monkeypatch.setattr(shard, "write", hang)

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator, patience=0.3)
        save(store, communicator, "a", 1, asynchronous=True)
        if communicator.rank == 0:
            while not store._background.ended():
                time.sleep(0.01)
            over.set()
        store.wait()

    first, second = outcomes(2, work)
    assert isinstance(first, CheckpointWriteFailed)
    assert "rank 1" in str(first)
    assert isinstance(second, CheckpointWriteFailed)


def test_only_the_coordinator_lists_the_directory(on_ranks, tmp_path, monkeypatch):
    """While ranks wait for a slow one, rank 0 alone lists, and what it sees keeps the others patient."""
    write, iterdir, listing = shard.write, Path.iterdir, []

    def slow(path, entries, buffers):
        if "rank-00002" in path.name:
            with path.open("wb") as file:
                for _ in range(20):  # more than the patience in all
                    file.write(b"x" * 100)
                    file.flush()
                    time.sleep(0.1)
        return write(path, entries, buffers)

    def noted(path):
        if ".partial-" in path.name:
            listing.append(threading.current_thread())
        return iterdir(path)

    monkeypatch.setattr(shard, "write", slow)
    monkeypatch.setattr(Path, "iterdir", noted)

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator, patience=1.5)
        save(store, communicator, "a", 1, asynchronous=True)
        mine = store._background._thread
        store.wait()
        return mine in listing

    assert on_ranks(3, work) == [True, False, False]


def test_an_abandoned_save_ends_soon(outcomes, on_ranks, tmp_path, monkeypatch):
    """``abandon`` gives up a save that waits for a dead rank long before the patience ends; complete ones stay."""
    monkeypatch.setattr(powertrain_checkpoint.store, "_GRACE", 0.3)

    def work(communicator):
        store = DirectoryStore(tmp_path, communicator)
        save(store, communicator, "good", 1)
        if communicator.rank == 1:  # it dies: its part never comes
            monkeypatch.setattr(store._background, "start", lambda tag, work: None)
        save(store, communicator, "bad", 2, asynchronous=True)
        if communicator.rank == 0:
            store.abandon()
            store.close()

    first, _ = outcomes(2, work)
    assert isinstance(first, CheckpointWriteFailed)
    assert "nothing was heard from rank 1" in str(first)
    assert on_ranks(1, lambda c: (DirectoryStore(tmp_path, c).tags(), content(DirectoryStore(tmp_path, c)))) == [
        (["good"], 1)
    ]


def test_a_file_size_limit_is_reported_with_its_path(outcomes, tmp_path):
    """A real refusal of the operating system, a file size limit, becomes CheckpointWriteFailed with the path."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        (error,) = outcomes(1, lambda c: save(DirectoryStore(tmp_path, c), c, "a", 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(error, CheckpointWriteFailed)
    assert "File too large" in str(error)


def test_a_directory_that_cannot_be_made_fails_every_rank(outcomes, tmp_path):
    """A place where no directory can be made raises on every rank before anything is written."""
    (tmp_path / "file").write_text("")

    def work(communicator):
        save(DirectoryStore(tmp_path / "file" / "checkpoints", communicator), communicator, "a", 1)

    for error in outcomes(2, work):
        assert isinstance(error, CheckpointWriteFailed)
        assert "file" in str(error)


@pytest.mark.parametrize("tag", ["", ".", "..", ".hidden", "a/b", "/a", "x" * 101])
def test_a_tag_must_be_a_plain_name(outcomes, tmp_path, tag):
    """Tags that would leave the directory, or hide in it, are refused."""
    (error,) = outcomes(1, lambda c: save(DirectoryStore(tmp_path / "d", c), c, tag, 1))
    assert isinstance(error, CheckpointError)
    assert repr(tag) in str(error)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("values", "place"),
    [({"a": {"b": [0, {1}]}}, "values.a.b[1]"), ({"a": {3: 0}}, "values.a"), ({"a": torch.ones(1)}, "values.a")],
)
def test_what_is_not_json_is_refused_by_its_place(outcomes, tmp_path, values, place):
    """Values that JSON would refuse or change are errors that say where they are."""
    (error,) = outcomes(
        1, lambda c: DirectoryStore(tmp_path, c).save("a", Snapshot(tensors=[], values=values, rank_values={}))
    )
    assert isinstance(error, CheckpointError)
    assert error.where == place


def test_what_differs_between_ranks_is_named(outcomes, tmp_path):
    """Values and tags that differ between ranks are refused by their place, and leave nothing behind."""

    def work(communicator):
        values = {"step": 3, "client": {"loss": 0.5 + communicator.rank // 2}}
        DirectoryStore(tmp_path, communicator).save("a", Snapshot(tensors=[], values=values, rank_values={}))

    def tags(communicator):
        save(DirectoryStore(tmp_path, communicator), communicator, f"a{communicator.rank}", 1)

    for error in outcomes(3, work):
        assert isinstance(error, CheckpointError)
        assert error.where == "values.client"
        assert "ranks 0 and 2" in str(error)
    assert [error.where for error in outcomes(2, tags)] == ["tag", "tag"]
    assert not list(tmp_path.iterdir())


def leftover(root, host=None, age=0.0):
    """Make what a save that died ``age`` seconds ago has left."""
    path = root / f".old.partial-{host or directory._host()}-{uuid.uuid4().hex[:12]}"
    path.mkdir(parents=True)
    file = path / "rank-00000.safetensors"
    file.write_bytes(b"torn")
    for changed in (file, path):
        os.utime(changed, (time.time() - age,) * 2)
    return path


def test_remains_of_dead_saves_are_removed_and_those_of_the_living_are_not(on_ranks, tmp_path):
    """The next save removes what dead saves left, but no save under way, nor a young one of another host."""
    dead = [leftover(tmp_path), leftover(tmp_path, "elsewhere", age=2e5), tmp_path / ".a.deleted-h-0123456789ab"]
    dead[2].mkdir()
    kept = [leftover(tmp_path, "elsewhere", age=60), tmp_path / ".a.partial-mine", tmp_path / ".git"]
    kept[1].mkdir()
    kept[2].mkdir()
    alive = directory.Workplace.make(tmp_path, "other")

    on_ranks(1, lambda c: save(DirectoryStore(tmp_path, c), c, "a", 1))
    assert not any(path.exists() for path in dead)
    assert all(path.exists() for path in [*kept, alive.path])
    alive.release()


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("runs/x", "runs/x"),
        ("/data/run:1", "/data/run:1"),
        ("file:///data/a%20b", "/data/a b"),
        ("s3://bucket/x", None),
    ],
)
def test_only_local_places_are_taken(uri, path):
    """Paths and file addresses are served; any other scheme is left to another plugin."""
    assert local_directory(uri) == (None if path is None else Path(path))
