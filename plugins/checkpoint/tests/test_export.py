from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, load_model

from powertrain.errors import CheckpointError, CheckpointMissing, ShardCorrupt
from powertrain.layout import Box
from powertrain.mesh import Mesh
from powertrain.plugin import NoConfig
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain.roles.communicator import SingleProcess
from powertrain_checkpoint.plugin import CheckpointPlugin
from powertrain_checkpoint.store import DirectoryStore

W = torch.randn(13, 24, 5, generator=torch.Generator().manual_seed(0))
COUNT = torch.arange(7)


def shares(rank, columns, parts):
    """One rank's flat share of a column block of W, replicas of the rest, and optimizer state."""
    column, part, width = rank % columns, rank // columns, 24 // columns
    block = W[:, column * width : (column + 1) * width].reshape(-1)
    start, stop = block.numel() * part // parts, block.numel() * (part + 1) // parts
    box = Box((0, column * width, 0), (13, width, 5))
    return [
        TensorSlice("model/w", (13, 24, 5), block[start:stop].clone(), start, box),
        TensorSlice("model/half", (13, 24, 5), block[start:stop].bfloat16(), start, box),
        TensorSlice("model/count", (7,), COUNT.clone()),
        TensorSlice("model/scalar", (), torch.tensor(2.5)),
        TensorSlice("model/none", (0, 4), torch.zeros(0)),
        TensorSlice("optimizer/w/m", (13, 24, 5), block[start:stop].clone(), start, box),
    ]


@pytest.fixture
def saved(on_ranks, tmp_path):
    """A directory with two checkpoints of a model on a grid of 2 x 3 ranks."""

    def save(communicator):
        store = DirectoryStore(tmp_path, communicator)
        for step in (100, 200):
            tensors = shares(communicator.rank, 2, 3)
            store.save(f"step-{step}", Snapshot(tensors=tensors, values={"step": step}, rank_values={}))

    on_ranks(6, save)
    return tmp_path


@pytest.fixture
def invoke():
    """Run a command line of a group that the plugin has added its commands to."""
    group = click.Group()
    CheckpointPlugin(NoConfig()).add_commands(group)

    def run(*arguments):
        return CliRunner().invoke(group, [str(argument) for argument in arguments])

    return run


def test_the_model_is_written_whole_and_unprefixed(invoke, saved, tmp_path):
    """The newest checkpoint's model tensors, and only these, come back bit-equal under their own names."""
    result = invoke("export", saved, tmp_path / "out.safetensors")
    assert result.exit_code == 0, result.output
    assert "5 tensors" in result.output
    assert "step-200" in result.output
    found = load_file(tmp_path / "out.safetensors")
    want = {"w": W, "half": W.bfloat16(), "count": COUNT, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in want.items())


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_floating_point_tensors_are_converted(invoke, saved, tmp_path, name, dtype):
    """With --dtype, floating-point tensors are converted as torch converts them, and integers stay."""
    assert invoke("export", saved, tmp_path / "out.safetensors", "--dtype", name, "--tag", "step-100").exit_code == 0
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["w"], W.to(dtype))
    assert torch.equal(found["half"], W.bfloat16().to(dtype))
    assert torch.equal(found["count"], COUNT)


def test_tied_parameters_are_written_once_and_load_strictly(on_ranks, tmp_path, invoke):
    """A model with tied weights is exported without a duplicate, and safetensors loads it strictly."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

    model, other = Tied(), Tied()

    def save(communicator):
        weight = model.embed.weight.detach()
        tensors = [TensorSlice("model/embed.weight", (8, 4), weight.view(-1))]
        values = {"aliases": {"head.weight": "embed.weight"}}
        DirectoryStore(tmp_path, communicator).save("a", Snapshot(tensors=tensors, values=values, rank_values={}))

    on_ranks(1, save)
    assert invoke("export", tmp_path, tmp_path / "out.safetensors").exit_code == 0
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    load_model(other, tmp_path / "out.safetensors", strict=True)
    assert torch.equal(other.head.weight, model.embed.weight)


def test_the_list_shows_each_checkpoint(invoke, saved):
    """--list prints a line per complete checkpoint, oldest first, with step, date, size and counts."""
    (saved / "step-300").mkdir()
    lines = invoke("export", saved, "--list").output.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["step-100", "100"], ["step-200", "200"]]
    assert lines[1].split()[-2:] == ["6", "6"]


def test_a_single_checkpoint_may_be_named(invoke, saved, tmp_path):
    """The directory of one checkpoint is taken in place of the directory of all."""
    result = invoke("export", saved / "step-100", tmp_path / "out.safetensors")
    assert result.exit_code == 0
    assert "step-100" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "OUTPUT"),
        (("out.safetensors", "--list"), "--list writes no file"),
        (("out.safetensors", "--dtype", "int4"), "int4"),
    ],
)
def test_misuse_exits_with_2(invoke, saved, arguments, words):
    """A wrong command line exits with 2 and says what is wrong."""
    result = invoke("export", saved, *arguments)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize("arguments", [("--list",), ("out.safetensors",), ("out.safetensors", "--tag", "x")])
def test_a_missing_checkpoint_is_an_error(invoke, tmp_path, arguments):
    """Where there is no checkpoint, the error says so and nothing is written."""
    result = invoke("export", tmp_path / "nowhere", *arguments)
    assert isinstance(result.exception, CheckpointMissing)
    assert "nowhere" in str(result.exception)


def test_a_damaged_shard_leaves_no_output(invoke, saved, tmp_path):
    """A checksum that does not match stops the export, and neither the file nor a part of it remains."""
    path = next((saved / "step-200").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = invoke("export", saved, tmp_path / "out.safetensors", "--tag", "step-200")
    assert isinstance(result.exception, ShardCorrupt)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-100", "step-200"]


def test_a_checkpoint_without_model_is_an_error(on_ranks, invoke, tmp_path):
    """A checkpoint that holds no model tensor is refused, not exported as an empty file."""
    on_ranks(1, lambda c: DirectoryStore(tmp_path, c).save("a", Snapshot(tensors=[], values={}, rank_values={})))
    assert isinstance(invoke("export", tmp_path, tmp_path / "out").exception, CheckpointError)


MEASURED = """
import re, sys

def peak():
    # Not ru_maxrss: across an exec it keeps what the parent had.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

if sys.argv[1] == "torch":
    import torch
before = peak()
from powertrain_checkpoint.command import export
export([*sys.argv[2:]], standalone_mode=False)
print(before, peak(), "torch" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Requires: Linux's /proc")
@pytest.mark.parametrize("options", [(), ("--dtype", "bf16")], ids=["as-saved", "converted"])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path, options):
    """Exporting 400 MB peaks below 1.5 times the largest tensor plus 200 MB; conversion adds torch's own 220 MB."""
    size = 25_000_000 // 4
    tensors = [TensorSlice(f"model/{i}", (size // 1000, 1000), torch.full((size,), float(i))) for i in range(16)]
    store = DirectoryStore(tmp_path, SingleProcess(Mesh.build(1, 0), torch.device("cpu")))
    store.save("a", Snapshot(tensors=tensors, values={}, rank_values={}))
    output = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", MEASURED, "torch" if options else "", str(tmp_path), str(output), *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    before, peak, torch_loaded = printed.splitlines()[-1].split()
    assert torch_loaded == str(bool(options))
    assert int(peak) <= 1.5 * 25e6 + 200e6 + (int(before) if options else 0)
    assert torch.equal(load_file(output)["15"].float(), torch.full((size // 1000, 1000), 15.0))
