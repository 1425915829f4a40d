"""``powertrain export`` to a directory that model libraries load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import powertrain
from powertrain.errors import CheckpointError, ShardCorrupt
from powertrain.plugin import NoConfig
from powertrain_checkpoint import manifest
from powertrain_checkpoint.export_library import parse_size, plan
from powertrain_checkpoint.image import Entry
from powertrain_checkpoint.plugin import CheckpointPlugin


class Net(nn.Module):
    """Layers of unequal size, a tied head and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(11))
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.token.weight
        self.register_buffer("count", torch.arange(5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.token(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden).square().mean()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A directory of one checkpoint, and the model that it holds, tied tensors once."""
    directory = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    with powertrain.initialize(Net()) as engine:
        engine.train_step((torch.arange(8).view(2, 4),))
        engine.save_checkpoint(str(directory), "one")
        state = engine.module.state_dict()
    return directory, {name: value.clone() for name, value in state.items() if name != "head.weight"}


def invoke(*arguments: Any) -> Any:
    """Run a command line of a group that the plugin has added its commands to."""
    group = click.Group()
    CheckpointPlugin(NoConfig()).add_commands(group)
    return CliRunner().invoke(group, [str(argument) for argument in arguments])


def whole(directory: Path) -> dict[str, torch.Tensor]:
    """Load all files of a directory."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found


def same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


def test_a_small_model_is_one_file(saved: Any, tmp_path: Path) -> None:
    """A name without .safetensors makes a directory; what fits is model.safetensors, without an index."""
    result = invoke("export", saved[0], tmp_path / "made" / "out")
    assert result.exit_code == 0, result.output
    assert f"{len(saved[1])} tensors" in result.output
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "made/out").iterdir()] == ["model.safetensors"]
    assert same(whole(tmp_path / "made/out"), saved[1])
    with safe_open(tmp_path / "made/out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "token.weight"}


def test_hf_makes_a_directory_of_any_name(saved: Any, tmp_path: Path) -> None:
    """--hf wins over a suffix; an empty directory is taken."""
    (tmp_path / "m.safetensors").mkdir()
    assert invoke("export", saved[0], tmp_path / "m.safetensors", "--hf").exit_code == 0
    assert (tmp_path / "m.safetensors/model.safetensors").is_file()


@pytest.mark.parametrize(("size", "files"), [("4kB", 5), ("1kB", 23), ("100000", 1)])
def test_files_are_cut_by_size(saved: Any, tmp_path: Path, size: str, files: int) -> None:
    """No file holds more than --shard-size, unless of a single tensor; the index names each tensor's file."""
    result = invoke("export", saved[0], tmp_path / "out", "--shard-size", size)
    assert result.exit_code == 0, result.output
    found = sorted((tmp_path / "out").glob("*.safetensors"))
    assert same(whole(tmp_path / "out"), saved[1])
    if files == 1:
        assert [path.name for path in found] == ["model.safetensors"]
        return
    assert [path.name for path in found] == [
        f"model-{k + 1:05d}-of-{len(found):05d}.safetensors" for k in range(len(found))
    ]
    for path in found:
        tensors = load_file(path)
        assert sum(t.nbytes for t in tensors.values()) <= parse_size(size) or len(tensors) == 1
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in saved[1].values())
    assert index["weight_map"] == {name: path.name for path in found for name in load_file(path)}
    assert len(found) == files


def test_an_export_begins_another_run(saved: Any, tmp_path: Path) -> None:
    """What was exported, in several files and converted, are weights for a deferred model."""
    assert invoke("export", saved[0], tmp_path / "out", "--shard-size", "4kB", "--dtype", "bf16").exit_code == 0
    with powertrain.deferred():
        model = Net()
    with powertrain.initialize(model, weights=tmp_path / "out"):
        found = {name: value for name, value in model.state_dict().items() if name != "head.weight"}
    want = {name: value.bfloat16().float() if value.is_floating_point() else value for name, value in saved[1].items()}
    assert same(found, want)


def test_configuration_and_tokenizer_come_along(saved: Any, tmp_path: Path) -> None:
    """A file becomes config.json; of a directory the tokenizer's files are copied too, and its weights are not."""
    base = tmp_path / "base"
    base.mkdir()
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "model.safetensors",
    ):
        (base / name).write_text("{}")
    (base / "notes.txt").write_text("private")
    assert invoke("export", saved[0], tmp_path / "out", "--config", base).exit_code == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in base.iterdir()} - {"notes.txt"}
    assert same(load_file(tmp_path / "out/model.safetensors"), saved[1])
    (tmp_path / "mine.json").write_text('{"a": 1}')
    assert invoke("export", saved[0], tmp_path / "two", "--config", tmp_path / "mine.json").exit_code == 0
    assert json.loads((tmp_path / "two/config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty", None), ("bad.json", "{"), ("list.json", "[1]")],
    ids=["missing", "no JSON", "a list"],
)
def test_a_wrong_configuration_leaves_nothing(saved: Any, tmp_path: Path, name: str, content: str | None) -> None:
    """A configuration that is not there or is none is told before anything is written."""
    config = tmp_path / name
    config.mkdir() if content is None else config.write_text(content)
    result = invoke("export", saved[0], tmp_path / "out", "--config", config)
    assert isinstance(result.exception, CheckpointError)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_there_is_not_replaced(saved: Any, tmp_path: Path) -> None:
    """A directory with something in it, or a file, is refused and stays."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    (tmp_path / "file").write_text("y")
    for name in ("out", "file"):
        result = invoke("export", saved[0], tmp_path / name)
        assert isinstance(result.exception, CheckpointError)
        assert "there already" in str(result.exception)
    assert (tmp_path / "out/precious").read_text() == "x"
    assert (tmp_path / "file").read_text() == "y"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_damaged_shard_leaves_no_directory(tmp_path: Path) -> None:
    """A checksum that does not match, met in the second file, removes the draft."""
    with powertrain.initialize(Net()) as engine:
        engine.save_checkpoint(str(tmp_path / "run"), "one")
    path = next((tmp_path / "run/one").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[manifest.load(tmp_path / "run/one").tensors["model/token.weight"].chunks[0].start] ^= 1
    path.write_bytes(data)
    result = invoke("export", tmp_path / "run", tmp_path / "out", "--shard-size", "1kB")
    assert isinstance(result.exception, ShardCorrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("out.safetensors", "--shard-size", "5GB"), "--hf"),
        (("out", "--shard-size", "five"), "is no size"),
        (("out", "--shard-size", "0"), "is no size"),
        (("out", "--config", "nowhere"), "nowhere"),
    ],
)
def test_misuse_exits_with_2(saved: Any, arguments: tuple[str, ...], words: str) -> None:
    """A wrong command line exits with 2 and says what is wrong."""
    result = invoke("export", saved[0], *arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_sizes() -> None:
    """Sizes are decimal as Hugging Face's are, binary with an i, and may have a fraction."""
    assert [parse_size(text) for text in ("7", "5GB", "1.5 kb", "2MiB", "1TB", "3G")] == [
        7, 5 * 10**9, 1500, 2 * 2**20, 10**12, 3 * 10**9,
    ]  # fmt: skip


def test_the_plan_keeps_the_order_and_the_limit() -> None:
    """Tensors stay in order; what is larger than the limit stands alone; empty tensors need no file."""
    entries = [Entry(str(i), "U8", (n,)) for i, n in enumerate([4, 4, 3, 20, 0, 1, 10, 1])]
    assert [[e.shape[0] for e in part] for part in plan(entries, 10)] == [[4, 4], [3], [20], [0, 1], [10], [1]]


def test_exporting_as_saved_needs_no_torch(saved: Any, tmp_path: Path) -> None:
    """The command writes a directory without importing torch or transformers."""
    code = (
        "import sys; from powertrain_checkpoint.command import export\n"
        "export(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(saved[0]), str(tmp_path / "out"), "--shard-size", "4kB"]
    subprocess.run(command, check=True, timeout=120)
    assert same(whole(tmp_path / "out"), saved[1])


def test_transformers_loads_it(tmp_path: Path) -> None:
    """A trained GPT-2 of transformers goes through a checkpoint and an export, and from_pretrained gives it back."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=12, bos_token_id=0, eos_token_id=0
    )
    config.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    with powertrain.deferred():
        model = transformers.GPT2LMHeadModel(config)
    tokens = torch.arange(20).view(2, 10)
    with powertrain.initialize(model) as engine:
        engine.train_step({"input_ids": tokens, "labels": tokens})
        engine.save_checkpoint(str(tmp_path / "run"))
    arguments = ("export", tmp_path / "run", tmp_path / "out", "--shard-size", "20kB", "--config", tmp_path / "base")
    assert invoke(*arguments).exit_code == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    back, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(back.eval()(tokens).logits, model.eval()(tokens).logits)
