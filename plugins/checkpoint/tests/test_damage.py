from __future__ import annotations

import ast
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import powertrain_checkpoint
from powertrain.errors import (
    CheckpointError,
    CheckpointMismatch,
    CheckpointMissing,
    ManifestMissing,
    ShardCorrupt,
    ShardMissing,
    ShardTruncated,
)
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain_checkpoint import manifest
from powertrain_checkpoint.store import DirectoryStore

WORLD = 3


def slices(rank, fill=None):
    whole = torch.arange(600, dtype=torch.float32)
    part = whole[200 * rank : 200 * (rank + 1)].clone()
    return [TensorSlice("model/w", (20, 30), part if fill is None else torch.full_like(part, fill), 200 * rank)]


@pytest.fixture
def saved(on_ranks, tmp_path):
    """A directory with the complete checkpoints one and two."""

    def save(communicator):
        store = DirectoryStore(tmp_path, communicator)
        for step, tag in enumerate(("one", "two")):
            store.save(tag, Snapshot(tensors=slices(communicator.rank), values={"step": step}, rank_values={}))

    on_ranks(WORLD, save)
    return tmp_path


def load(root, tag=None):
    def work(communicator):
        got = slices(communicator.rank, fill=-1)
        DirectoryStore(root, communicator).open(tag).read(got)
        assert torch.equal(got[0].tensor, slices(communicator.rank)[0].tensor)

    return work


def assert_all_raise(results, kind, *words):
    assert [type(result) for result in results] == [kind] * WORLD
    for result in results:
        for word in words:
            assert word in str(result)


def test_an_undamaged_checkpoint_loads(on_ranks, saved):
    """What the other tests damage loads when it is whole."""
    on_ranks(WORLD, load(saved))


def test_a_missing_directory_is_named(outcomes, tmp_path):
    """Loading from a directory that does not exist raises CheckpointMissing with its path, on every rank."""
    assert_all_raise(outcomes(WORLD, load(tmp_path / "nowhere")), CheckpointMissing, "nowhere", "does not exist")


def test_an_unknown_tag_lists_those_that_exist(outcomes, saved):
    """Loading a tag that is not there raises CheckpointMissing and lists the complete ones."""
    assert_all_raise(outcomes(WORLD, load(saved, "three")), CheckpointMissing, "three", "one, two")


def test_a_directory_without_manifest_is_an_unfinished_save(outcomes, saved):
    """A tag without a manifest raises ManifestMissing, and the newest complete one is the other."""
    (saved / "two" / manifest.FILE_NAME).unlink()
    assert_all_raise(outcomes(WORLD, load(saved, "two")), ManifestMissing, "two")
    assert outcomes(WORLD, load(saved)) == [None] * WORLD


def test_only_unfinished_saves_are_not_nothing(outcomes, saved):
    """Where every save is unfinished, asking for the newest says so; other directories are no saves."""
    (saved / "photos").mkdir()
    for tag in ("one", "two"):
        (saved / tag / manifest.FILE_NAME).unlink()
    assert_all_raise(outcomes(WORLD, load(saved)), ManifestMissing, "two")


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_missing_shard_fails_every_rank(outcomes, saved, rank):
    """A shard that is not there raises ShardMissing with its name on every rank, not only on the one that looked."""
    (saved / "two" / f"rank-0000{rank}.safetensors").unlink()
    assert_all_raise(outcomes(WORLD, load(saved)), ShardMissing, f"rank-0000{rank}.safetensors")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_size_fails_every_rank(outcomes, saved, change):
    """A shard that lost or gained a byte raises ShardTruncated with both sizes."""
    path = saved / "two" / "rank-00001.safetensors"
    size = path.stat().st_size
    os.truncate(path, size + change)
    assert_all_raise(outcomes(WORLD, load(saved)), ShardTruncated, f"{size:,}", f"{size + change:,}")


def test_any_altered_byte_of_a_shard_is_found(outcomes, saved):
    """Whichever byte of a shard changes, in its header or in a tensor, every rank raises ShardCorrupt with its name."""
    path = saved / "two" / "rank-00002.safetensors"
    whole = path.read_bytes()
    for position in range(0, len(whole), 61):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        assert_all_raise(outcomes(WORLD, load(saved)), ShardCorrupt, path.name)


@pytest.mark.parametrize("damaged", range(WORLD))
def test_a_damaged_block_changes_no_tensor_on_any_rank(on_ranks, saved, damaged):
    """When one rank's part of the files is damaged, every rank's tensors stay as they were, also those read before."""
    path = saved / "two" / f"rank-0000{damaged}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    def work(communicator):
        got = slices(communicator.rank, fill=-1)
        everything = torch.full((600,), -1.0)
        for wanted in (got, [*got, TensorSlice("model/w", (20, 30), everything)]):
            with pytest.raises(ShardCorrupt):
                DirectoryStore(saved, communicator).open("two").read(wanted)
            assert all(bool((item.tensor == -1).all()) for item in wanted)

    on_ranks(WORLD, work)


def test_any_altered_byte_of_a_manifest_is_found(outcomes, saved):
    """Whichever byte of the manifest changes, or if it ends early, every rank raises ShardCorrupt."""
    path = saved / "two" / manifest.FILE_NAME
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert_all_raise(outcomes(WORLD, load(saved, "two")), ShardCorrupt, path.name)
    for length in (0, 10, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_all_raise(outcomes(WORLD, load(saved, "two")), ShardCorrupt, path.name)


def test_a_newer_format_says_which_version_wrote_it(outcomes, saved, monkeypatch):
    """A checkpoint of a later format is refused with the version that can read it."""
    found = manifest.load(saved / "two")
    monkeypatch.setattr(manifest, "FORMAT", 2)
    (saved / "two" / manifest.FILE_NAME).write_bytes(found.to_bytes())
    monkeypatch.setattr(manifest, "FORMAT", 1)
    assert_all_raise(outcomes(WORLD, load(saved)), CheckpointError, "format 2", found.version)


def test_another_model_is_refused_before_anything_changes(outcomes, saved):
    """Names or shapes that differ on one rank raise CheckpointMismatch on all, and nothing is filled."""

    def work(communicator):
        right = slices(communicator.rank, fill=-1)
        wrong = [TensorSlice("model/v", (20, 30), torch.zeros(1)), TensorSlice("model/w", (30, 20), torch.zeros(1))]
        reader = DirectoryStore(saved, communicator).open()
        try:
            reader.read(right + (wrong if communicator.rank == 1 else []))
        finally:
            assert bool((right[0].tensor == -1).all())

    assert_all_raise(
        outcomes(WORLD, work), CheckpointMismatch, "model/v is not in it (nearest: model/w)", "[20, 30]", "[30, 20]"
    )


def test_at_most_ten_differences_are_listed(outcomes, saved):
    """A wholly different model gets ten lines and a count, not a thousand lines."""

    def work(communicator):
        wrong = [TensorSlice(f"other/{i}", (1,), torch.zeros(1)) for i in range(1000)]
        DirectoryStore(saved, communicator).open().read(wrong)

    results = outcomes(WORLD, work)
    assert_all_raise(results, CheckpointMismatch, "1000 tensors", "and 990 more")
    assert len(str(results[0]).splitlines()) < 20


def test_what_the_system_refuses_fails_every_rank(outcomes, saved, monkeypatch):
    """An I/O error of the disk while one rank reads is a CheckpointError with its words, on every rank."""

    def refuse(descriptor, *arguments):
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "rank-00001.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, *arguments)

    read = os.preadv
    monkeypatch.setattr(os, "preadv", refuse)
    assert_all_raise(outcomes(WORLD, load(saved)), CheckpointError, "Input/output error", "rank-00001.safetensors")


def test_a_copied_checkpoint_loads(on_ranks, saved):
    """A checkpoint directory that was copied elsewhere under another name loads there."""
    shutil.copytree(saved / "one", saved / "else" / "copy")
    on_ranks(WORLD, load(saved / "else", "copy"))


def test_no_source_file_mentions_pickle_or_torch_load():
    """No module imports pickle or calls torch.load, torch.save or anything named load with weights_only."""
    for path in Path(powertrain_checkpoint.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not [name for name in names if re.search(r"pickle|marshal|shelve", name)], path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), path


def test_loading_never_unpickles(saved):
    """A load under an audit hook that forbids pickle's class lookup succeeds."""
    script = """
import sys
from pathlib import Path
import torch
from powertrain.mesh import Mesh
from powertrain.roles.checkpoint import TensorSlice
from powertrain.roles.communicator import SingleProcess
from powertrain_checkpoint.store import DirectoryStore
import torch.distributed.checkpoint

def forbid(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError(f"unpickled {arguments}")

sys.addaudithook(forbid)
store = DirectoryStore(Path(sys.argv[1]), SingleProcess(Mesh.build(1, 0), torch.device("cpu")))
tensor = torch.zeros(600)
store.open().read([TensorSlice("model/w", (20, 30), tensor)])
assert torch.equal(tensor, torch.arange(600.0))
"""
    subprocess.run([sys.executable, "-c", script, str(saved)], check=True, timeout=120)
