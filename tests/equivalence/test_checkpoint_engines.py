"""Checkpoints through the I/O engines that are installed, against those without: the same files, byte by byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import plain
import pytest
import torch

import powertrain
from powertrain.mesh import Mesh
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain.roles.communicator import SingleProcess
from powertrain_checkpoint.store import DirectoryStore
from powertrain_offload import io

SHAPES = {"model/a": (1300, 1700), "model/b": (3,), "optimizer/a/m": (1300, 1700), "step": (), "odd": (4099, 3)}


def files(path: Path) -> dict[str, bytes]:
    """Return the shards of a checkpoint."""
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


@pytest.mark.parametrize("kind", ["uring", "direct", "threads"])
def test_every_engine_writes_the_same_files(tmp_path: Path, kind: str) -> None:
    """Synchronous and asynchronous; and each loads what another has written."""
    why = io.available()[kind]  # type: ignore[index]
    if why:
        pytest.skip(why)
    draw = torch.Generator().manual_seed(3)
    state = {name: torch.rand(shape, generator=draw) for name, shape in SHAPES.items()}
    communicator = SingleProcess(Mesh.build(1, 0), torch.device("cpu"))

    def slices(tensors: dict[str, torch.Tensor]) -> list[TensorSlice]:
        return [TensorSlice(name, SHAPES[name], tensor.view(-1)) for name, tensor in tensors.items()]

    stores = {
        "none": DirectoryStore(tmp_path / "none", communicator),
        kind: DirectoryStore(tmp_path / kind, communicator, make_engine=lambda: io.open_engine(kind, depth=3)),
    }
    for store in stores.values():
        for tag, asynchronous in (("a", False), ("b", True), ("b", True)):
            store.save(tag, Snapshot(tensors=slices(state), values={}, rank_values={}), asynchronous=asynchronous)
        store.wait()
    expected = files(tmp_path / "none" / "a")
    for name in stores:
        assert list(files(tmp_path / name / "a").values()) == list(expected.values())
        assert list(files(tmp_path / name / "b").values()) == list(expected.values())
        mode = (tmp_path / name / "a" / "rank-00000.safetensors").stat().st_mode
        assert mode == (tmp_path / "none" / "a" / "manifest.json").stat().st_mode
    (tmp_path / "none" / "a").rename(tmp_path / kind / "moved")
    found = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    stores[kind].open("moved").read(slices(found))
    assert all(torch.equal(found[name], state[name]) for name in SHAPES)
    for store in stores.values():
        store.close()


def test_a_program_that_ends_without_closing_still_gets_its_last_save(tmp_path: Path) -> None:
    """At a process's end the save under way is finished before the engine that it needs is."""
    script = """
import sys
from pathlib import Path
import torch
from powertrain.mesh import Mesh
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain.roles.communicator import SingleProcess
from powertrain_checkpoint.store import DirectoryStore
from powertrain_offload import io
comm = SingleProcess(Mesh.build(1, 0), torch.device("cpu"))
store = DirectoryStore(Path(sys.argv[1]), comm, make_engine=io.open_engine)
tensor = torch.ones(30_000_000)
snapshot = Snapshot(tensors=[TensorSlice("x", (30_000_000,), tensor)], values={}, rank_values={})
store.save("last", snapshot, asynchronous=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0
    assert not done.stderr
    communicator = SingleProcess(Mesh.build(1, 0), torch.device("cpu"))
    found = torch.zeros(30_000_000)
    DirectoryStore(tmp_path, communicator).open("last").read([TensorSlice("x", (30_000_000,), found)])
    assert bool((found == 1).all())


def train(settings: dict[str, Any], directory: str, load: bool, asynchronous: bool) -> list[Any]:
    """Save after two steps, or load; then train two more; return losses and slices."""
    torch.manual_seed(3)
    settings = {**settings, "checkpoint": {"directory": directory, "asynchronous": asynchronous}}
    hidden = 301  # odd: nothing ends where pages do
    model = torch.nn.Sequential(
        torch.nn.Linear(plain.FEATURES, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, plain.CLASSES)
    )
    with powertrain.initialize(model, settings, loss_fn=torch.nn.CrossEntropyLoss()) as engine:
        mine = plain.piece(plain.make_data(), engine.data_rank, engine.data_size)
        if load:
            engine.load_checkpoint()
        else:
            engine.train_step(mine)
            engine.train_step(mine)
            engine.save_checkpoint()
        return [float(engine.train_step(mine)) for _ in range(2)]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
def test_state_that_rests_on_disks_resumes(
    ranks: Any, tmp_path: Path, before: int, after: int, asynchronous: bool
) -> None:
    """What is saved from swap files loads into swap files and into memory, on any number of ranks: the same losses."""
    settings = {"zero": {"stage": 3}, "optimizer": {"lr": 0.01}}
    swap = tmp_path / "swap"
    swap.mkdir()
    away = {**settings, "offload": {"optimizer": "nvme", "parameters": "nvme", "path": str(swap), "grain": 4096}}
    expected = ranks(before, train, away, str(tmp_path / "c"), False, asynchronous)
    for again in (away, settings):
        found = ranks(after, train, again, str(tmp_path / "c"), True, asynchronous)
        assert sum(map(sum, found)) / after == pytest.approx(sum(map(sum, expected)) / before, rel=1e-6)
    assert not list(swap.iterdir())
