"""Models that are born sharded, and what leaves a sharded run."""

from __future__ import annotations

import ctypes
import gc
import json
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import plain
import pytest
import sharded
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

import powertrain
from powertrain.cli.root import cli

WIDTH, DEPTH = 1024, 48
UNIT = WIDTH * WIDTH * 4
MODEL_BYTES = UNIT * DEPTH


class Stack(nn.Module):
    """Many equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def resident(key: str) -> int:
    """Return a figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def resident_birth() -> int:
    """Return how far the resident memory rises while a deferred model becomes a stage-3 engine."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the heap kept of the last engine is not this one's
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    with powertrain.deferred():
        model = Stack()
    with powertrain.initialize(model, {"zero": {"stage": 3}}):
        return resident("VmHWM") - before


def allocated_birth(trace: Path) -> tuple[int, int]:
    """Return the most bytes of tensors that live during such a birth, and those that live after it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        with powertrain.deferred():
            model = Stack()
        engine = powertrain.initialize(model, {"zero": {"stage": 3}})
    engine.close()
    own = trace / f"{os.getpid()}.json"
    profiler.export_chrome_trace(str(own))
    events = [event for event in json.loads(own.read_text())["traceEvents"] if event["name"] == "[memory]"]
    live = list(accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])))
    return max(live), live[-1]


def test_a_birth_allocates_what_stays_and_one_unit(ranks: Any, tmp_path: Path) -> None:
    """Beside its slices (parameters, and gradients for later) a rank has one layer at any time."""
    for peak, stays in ranks(4, allocated_birth, tmp_path):
        assert stays <= 2 * MODEL_BYTES / 4 + UNIT / 8
        assert peak <= stays + UNIT * 9 / 8  # states of the generator: 5 KB a layer


def test_the_resident_peak_of_birth_is_the_slice_and_a_unit(ranks: Any) -> None:
    """Of 201 MB, each of four ranks has its quarter, one layer, and little else in memory at any time."""
    ranks(4, resident_birth)  # threads, caches and libraries come with the first
    for peak in ranks(4, resident_birth):
        assert peak <= MODEL_BYTES / 4 + 1.5 * UNIT


def tower(config: dict[str, Any], deferred: bool) -> sharded.Slices:
    torch.manual_seed(7)
    if deferred:
        with powertrain.deferred():
            model = sharded.Tower()
    else:
        model = sharded.Tower()
    with powertrain.initialize(model, config, loss_fn=nn.CrossEntropyLoss()) as engine:
        engine.train_step(sharded.data(engine.data_size)[engine.data_rank])
        return sharded.slices(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deferred_model_trains_as_an_eager_one(ranks: Any, stage: int) -> None:
    """Born a slice at a time, sharded training has the bits of the model that was built whole."""
    config = {"zero": {"stage": stage}}
    born, built = (sharded.whole(ranks(2, tower, config, deferred)) for deferred in (True, False))
    assert plain.same_bits(born, built)


def save(directory: str) -> None:
    with powertrain.initialize(sharded.make_tower(), {"zero": {"stage": 3}}, loss_fn=nn.CrossEntropyLoss()) as engine:
        engine.train_step(sharded.data(engine.data_size)[engine.data_rank])
        engine.save_checkpoint(directory, tag="end")
        found = {name: tensor.clone() for name, tensor in powertrain.stream(engine)}
        if engine.data_rank == 0:
            torch.save(found, Path(directory) / "streamed.pt")


def test_a_sharded_checkpoint_is_exported_whole(ranks: Any, tmp_path: Path) -> None:
    """``powertrain export`` makes one directory of a stage-3 checkpoint, with what ``powertrain.stream`` yields."""
    ranks(3, save, str(tmp_path))
    done = CliRunner().invoke(cli, ["export", str(tmp_path), str(tmp_path / "out"), "--hf", "--shard-size", "4KB"])
    assert done.exit_code == 0, done.output
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    exported: dict[str, torch.Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        exported |= load_file(tmp_path / "out" / name)
    assert plain.same_bits(exported, torch.load(tmp_path / "streamed.pt"))


def finer(stage: int, where: str) -> sharded.Slices:
    """Accumulate by hand, with averaging put off in some or all micro-batches."""
    config = {"zero": {"stage": stage, "bucket": 300}, "batch": {"accumulation": 3}}
    with powertrain.initialize(sharded.make_tower(), config, loss_fn=nn.CrossEntropyLoss()) as engine:
        mine = sharded.data(6)[engine.data_rank * 3 : engine.data_rank * 3 + 3]
        for _ in range(3):
            for number, micro in enumerate(mine):
                if where == "all" or (where == "some" and number < 2):
                    with engine.no_sync():
                        engine.backward(engine(micro))
                else:
                    engine.backward(engine(micro))
                assert engine.step() == (number == 2)
        return sharded.slices(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_sync_is_legal_at_every_stage(ranks: Any, stage: int) -> None:
    """Averaging that is put off, in some micro-batches or in all, changes nothing."""
    usual, some, every = (sharded.parameters(ranks(2, finer, stage, where)) for where in ("none", "some", "all"))
    assert plain.difference(some, usual) <= 1e-6
    assert plain.difference(every, usual) <= 1e-6
