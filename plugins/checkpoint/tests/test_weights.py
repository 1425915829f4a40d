"""Weights that a model library wrote: found, matched by name, read by ranges, refused when damaged."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import powertrain
from powertrain.errors import (
    CheckpointError,
    CheckpointMismatch,
    CheckpointMissing,
    ShardCorrupt,
    ShardMissing,
    ShardTruncated,
)
from powertrain.layout import Box
from powertrain.mesh import Mesh
from powertrain.roles.checkpoint import TensorSlice
from powertrain.roles.communicator import SingleProcess
from powertrain.tape import Tape
from powertrain_checkpoint.library import read_header
from powertrain_checkpoint.store import DirectoryStore


class Net(nn.Module):
    """A tied head, a buffer that is saved and one that is not."""

    def __init__(self, seed: int = 0, width: int = 8) -> None:
        super().__init__()
        self.token = nn.Embedding(16, width)
        self.body = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.token.weight
        self.register_buffer("scale", torch.full((width,), 1.0 + seed))
        self.register_buffer("mask", torch.arange(width) + seed, persistent=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.token(tokens) * self.scale.to(self.token.weight.dtype)
        return nn.functional.cross_entropy(
            self.head(hidden + self.body(hidden)).flatten(0, 1).float(), targets.flatten()
        )


class Wrapped(nn.Module):
    """The same model one level down."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.transformer = Net(**options)


def made(seed: int, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(seed, **options)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state dict as libraries write it: tied tensors once."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name != "head.weight"}


def write(directory: Path, tensors: dict[str, torch.Tensor], parts: int = 1) -> Path:
    """Write a directory of one file, or of several with an index."""
    directory.mkdir(exist_ok=True)
    if parts == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    table = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = dict(list(tensors.items())[part::parts])
        save_file(mine, directory / name, {"format": "pt"})
        table |= dict.fromkeys(mine, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return directory


def store(path: Path) -> DirectoryStore:
    return DirectoryStore(path, SingleProcess(Mesh.build(1, 0), torch.device("cpu")))


def same(model: nn.Module, want: dict[str, torch.Tensor]) -> bool:
    found = state(model)
    return found.keys() == want.keys() and all(
        torch.equal(found[name], want[name].to(found[name].dtype)) for name in want
    )


BATCH = (torch.arange(16).view(2, 8), torch.arange(16).view(2, 8))


# --- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3])
def test_every_slice_is_read_from_its_own_bytes(tmp_path: Path, monkeypatch: Any, parts: int) -> None:
    """A flat slice is one read of just its bytes; a slice of a block reads no more than its rows."""
    want = {f"w{i}": torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(i)).to(dtype)
            for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float64])}  # fmt: skip
    reader = store(write(tmp_path / "w", want, parts)).open_weights()
    assert {name: info.dtype for name, info in reader.tensors.items()} == {
        f"model/{name}": value.dtype for name, value in want.items()
    }
    sizes: list[int] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: sizes.append(real(fd, views, at)) or sizes[-1])
    for name, value in want.items():
        for start, stop in [(0, 120), (7, 61), (119, 120), (50, 50)]:
            sizes.clear()
            target = torch.full((stop - start,), torch.nan)
            reader.read([TensorSlice(f"model/{name}", (6, 5, 4), target, start)])
            assert torch.equal(target, value.flatten()[start:stop].float())
            assert sizes == [(stop - start) * value.element_size()] * (stop > start)
        for box in [Box((1, 2, 0), (3, 2, 4)), Box((0, 0, 1), (6, 5, 2)), Box((2, 0, 0), (2, 5, 4))]:
            block = value[tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))].flatten()
            for start, stop in [(0, box.numel), (3, box.numel - 2)]:
                sizes.clear()
                target = torch.empty(stop - start, dtype=value.dtype)
                reader.read([TensorSlice(f"model/{name}", (6, 5, 4), target, start, box)])
                assert torch.equal(target, block[start:stop])
                assert sum(sizes) == (stop - start) * value.element_size()


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: Any) -> None:
    """A conversion holds one piece of the file beside the target."""
    monkeypatch.setattr("powertrain_checkpoint.weights._PIECE", 1000)
    want = torch.randn(40, 33)
    reader = store(write(tmp_path / "w", {"w": want})).open_weights()
    target = torch.empty(40 * 33 - 11, dtype=torch.float64)
    reader.read([TensorSlice("model/w", (40, 33), target, 11)])
    assert torch.equal(target, want.flatten()[11:].double())


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    """0-d and zero-sized tensors are read like any other."""
    reader = store(write(tmp_path / "w", {"s": torch.tensor(7), "e": torch.zeros(0, 3)})).open_weights()
    scalar, empty = torch.zeros(1), torch.zeros(0)
    reader.read([TensorSlice("model/s", (), scalar), TensorSlice("model/e", (0, 3), empty)])
    assert scalar.item() == 7


def test_ranks_read_without_waiting_for_one_another(tmp_path: Path, on_ranks: Any) -> None:
    """Opening is one agreement; reading is local, so ranks may read different numbers of times."""
    want = torch.arange(100.0)
    write(tmp_path / "w", {"w": want})

    def read(communicator: Any) -> bool:
        reader = DirectoryStore(tmp_path / "w", communicator).open_weights()
        before, rank = communicator.issued, communicator.rank
        for _ in range(rank):
            target = torch.zeros(25)
            reader.read([TensorSlice("model/w", (100,), target, 25 * rank)])
            assert torch.equal(target, want[25 * rank : 25 * rank + 25])
        return bool(communicator.issued == before)

    assert on_ranks(4, read) == [True] * 4


# --- an engine's first values -------------------------------------------------------------------


@pytest.mark.parametrize("defer", [True, False, "meta"])
@pytest.mark.parametrize("parts", [1, 3])
def test_an_engine_begins_with_the_weights(tmp_path: Path, monkeypatch: Any, parts: int, defer: Any) -> None:
    """Parameters and saved buffers come from the files, whatever the model was made of; no random number is drawn."""
    want = state(made(1))
    write(tmp_path / "w", want, parts)
    torch.manual_seed(5)
    if defer == "meta":
        with torch.device("meta"):
            model = Net(2)
        model.mask = torch.arange(8) + 2
    elif defer:
        with powertrain.deferred():
            model = Net(2)
    else:
        model = Net(2)
    monkeypatch.setattr(Tape, "state_after", lambda *_: pytest.fail("the tape was asked for random numbers"))
    with powertrain.initialize(model, weights=tmp_path / "w") as engine:
        assert same(model, want)
        assert torch.equal(model.mask, torch.arange(8) + 2)
        assert model.head.weight is model.token.weight
        engine.train_step(BATCH)
        assert not same(model, want)


def test_what_the_files_lack_is_an_error_that_names_it(tmp_path: Path) -> None:
    """Missing, unexpected and near names are listed, up to ten."""
    want = state(made(1))
    want["body.0.wieght"] = want.pop("body.0.weight")
    write(tmp_path / "w", want)
    with pytest.raises(CheckpointMismatch) as caught, powertrain.deferred():
        powertrain.initialize(made(2), weights=tmp_path / "w")
    text = str(caught.value)
    assert "body.0.weight: not in the files; did you mean 'body.0.wieght'?" in text
    assert "body.0.wieght: in the files, not in the model" in text
    write(tmp_path / "w", state(made(1)) | {f"extra.{i}": torch.zeros(1) for i in range(15)})
    with pytest.raises(CheckpointMismatch, match="15 tensors differ") as caught:
        powertrain.initialize(made(2), weights=tmp_path / "w")
    assert str(caught.value).count("extra.") == 10
    assert "and 5 more" in str(caught.value)


def test_other_shapes_are_an_error(tmp_path: Path) -> None:
    """A tensor of another shape is refused, whether strict or not."""
    write(tmp_path / "w", state(made(1, width=6)))
    with powertrain.initialize(made(2)) as engine:
        before = state(engine.module)
        for strict in (True, False):
            with pytest.raises(CheckpointMismatch, match="of another model") as caught:
                engine.load_weights(tmp_path / "w", strict=strict)
            assert "token.weight: shape [16, 6] in the files, [16, 8] in the model" in str(caught.value)
        assert same(engine.module, before)


@pytest.mark.parametrize("alias", ["head.weight", "token.weight"])
def test_a_tied_tensor_is_found_under_any_name(tmp_path: Path, alias: str) -> None:
    """The file may hold a tied tensor under one of its names, or under both."""
    want = state(made(1))
    tied = want.pop("token.weight")
    for names in ([alias], ["head.weight", "token.weight"]):
        write(tmp_path / "w", want | {name: tied.clone() for name in names})
        with powertrain.initialize(made(2), weights=tmp_path / "w") as engine:
            assert torch.equal(engine.module.token.weight, tied)
            assert same(engine.module, want | {"token.weight": tied})


def test_one_prefix_more_or_less_is_passed_over(tmp_path: Path) -> None:
    """Files of a base model fit the model around it, and the other way round; half a match does not."""
    want = state(made(1))
    write(tmp_path / "base", want)
    write(tmp_path / "whole", {f"module.transformer.{name}": value for name, value in want.items()})
    for path in ("base", "whole"):
        torch.manual_seed(3)
        with powertrain.deferred():
            model = Wrapped(seed=2)
        with powertrain.initialize(model, weights=tmp_path / path):
            assert same(model.transformer, want)
    with powertrain.initialize(made(2), weights=tmp_path / "whole") as engine:
        assert same(engine.module, want)
    write(tmp_path / "half", {("x." if "0" in name else "y.") + name: value for name, value in want.items()})
    with pytest.raises(CheckpointMismatch):
        powertrain.initialize(made(2), weights=tmp_path / "half")


def test_names_of_buffers_that_are_not_saved_are_passed_over(tmp_path: Path) -> None:
    """Old files hold masks that newer models make themselves."""
    write(tmp_path / "w", state(made(1)) | {"mask": torch.zeros(8)})
    with powertrain.initialize(made(2), weights=tmp_path / "w") as engine:
        assert torch.equal(engine.module.mask, torch.arange(8) + 2)


# --- an engine that runs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, {"precision": {"compute": "bf16"}}, {"zero": {"stage": 1}}, {"zero": {"stage": 3}}]
)
def test_a_running_engine_takes_weights(tmp_path: Path, config: dict[str, Any]) -> None:
    """Masters, model and buffers follow, whoever holds them; the report says what was loaded."""
    want = {name: value.double() for name, value in state(made(1)).items()}
    write(tmp_path / "w", want, 2)
    with powertrain.initialize(made(2), config) as engine:
        engine.train_step(BATCH)
        report = engine.load_weights(tmp_path / "w")
        assert sorted(report.loaded) == sorted(want)
        assert not report.missing
        assert not report.unexpected
        for name, param in engine.module.named_parameters():
            piece = engine.optimizer_wrapper.parts(param)["value"]
            assert torch.equal(piece.tensor, want[name].flatten().to(piece.tensor.dtype))
            with powertrain.full(param):
                assert torch.equal(param, want[name].to(param.dtype))
        assert torch.equal(engine.module.scale, want["scale"].to(engine.module.scale.dtype))
        engine.train_step(BATCH)


def test_not_strict_loads_what_matches(tmp_path: Path) -> None:
    """The report lists what was loaded, missing and unexpected; the rest of the model stays."""
    want = state(made(1))
    del want["body.0.weight"]
    write(tmp_path / "w", want | {"other": torch.zeros(2)})
    with powertrain.initialize(made(2)) as engine:
        before = state(engine.module)
        report = engine.load_weights(tmp_path / "w", strict=False)
        assert report.missing == ["body.0.weight"]
        assert report.unexpected == ["other"]
        assert sorted(report.loaded) == sorted(want)
        assert str(report) == "w: 5 tensors, 1 missing, 1 unexpected"
        assert same(engine.module, want | {"body.0.weight": before["body.0.weight"]})
        with pytest.raises(CheckpointMismatch):
            engine.load_weights(tmp_path / "w")


def loaded_on_ranks(path: str, config: dict[str, Any], defer: bool) -> dict[str, torch.Tensor]:
    """Begin with weights, train, load them again, and return the model whole; run on every rank."""
    torch.manual_seed(4)
    with powertrain.deferred() if defer else nullcontext():
        model = Net()
    with powertrain.initialize(model, config, weights=path) as engine:
        first = {}
        for name, param in model.named_parameters():
            with powertrain.full(param):
                first[name] = param.detach().clone()
        engine.train_step(tuple(tensor[engine.data_rank :: engine.data_size] for tensor in BATCH))
        engine.load_weights(path)
        for name, param in model.named_parameters():
            with powertrain.full(param):
                assert torch.equal(param, first[name]), name
        return first


@pytest.mark.parametrize(
    ("config", "defer"),
    [
        ({}, False),
        ({}, True),
        ({"zero": {"stage": 2}}, True),
        ({"zero": {"stage": 3}}, False),
        ({"zero": {"stage": 3}}, True),
    ],
)
def test_ranks_share_the_reading(tmp_path: Path, ranks: Any, config: dict[str, Any], defer: bool) -> None:
    """Two ranks, replicated or sharded, begin with the weights, and take them again later."""
    want = state(made(1))
    write(tmp_path / "w", want, 2)
    for found in ranks(2, loaded_on_ranks, str(tmp_path / "w"), config, defer):
        assert found.keys() == want.keys() - {"scale"}
        assert all(torch.equal(found[name], want[name]) for name in found)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [-1, -100, 5, 60])
def test_a_short_file_is_named(tmp_path: Path, cut: int) -> None:
    """A download that was cut off, in the data, the header or the first bytes, is told before anything is read."""
    path = write(tmp_path / "w", state(made(1)), 2) / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ShardTruncated, match="model-00002-of-00002"):
        powertrain.initialize(made(2), weights=tmp_path / "w")
    path.write_bytes(b"")
    with pytest.raises(ShardTruncated):
        read_header(path)


def test_a_long_file_is_named(tmp_path: Path) -> None:
    """Bytes after the last tensor are told."""
    path = write(tmp_path / "w", state(made(1))) / "model.safetensors"
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ShardTruncated, match="not as long as"):
        store(tmp_path / "w").open_weights()


@pytest.mark.parametrize(
    "header",
    [b"x" * 64, b"[1]", b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b'{"a":{"dtype":"F32"}}',
     b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
     b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}'],
)  # fmt: skip
def test_a_header_without_sense_is_named(tmp_path: Path, header: bytes) -> None:
    """What is no header of safetensors, or contradicts itself, is corrupt."""
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(ShardCorrupt, match=r"w\.safetensors"):
        store(tmp_path / "w.safetensors").open_weights()
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 4096)
    with pytest.raises(ShardCorrupt, match="no safetensors file"):
        store(tmp_path / "w.safetensors").open_weights()


def test_an_index_that_lies_is_named(tmp_path: Path) -> None:
    """A file that is not there, a tensor that is not in its file, and an index that is no JSON."""
    path = write(tmp_path / "w", state(made(1)), 2)
    index = path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    swapped = dict(zip(table["weight_map"], reversed(table["weight_map"].values()), strict=True))
    index.write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(ShardCorrupt, match="which is not in it"):
        store(path).open_weights()
    index.write_text("{")
    with pytest.raises(ShardCorrupt, match="cannot be read"):
        store(path).open_weights()
    index.write_text(json.dumps({"weight_map": {"w": "../other.safetensors"}}))
    with pytest.raises(ShardCorrupt, match="outside"):
        store(path).open_weights()
    index.write_text(json.dumps(table))
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ShardMissing, match="model-00001-of-00002"):
        store(path).open_weights()


def test_places_without_weights_say_what_to_do(tmp_path: Path) -> None:
    """A hub's name, pickled weights, a run's checkpoints and an ambiguous directory each have their remedy."""
    with pytest.raises(CheckpointMissing, match="download"):
        powertrain.initialize(made(2), weights="gpt2")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointMissing, match="save_pretrained"):
        store(tmp_path / "old").open_weights()
    with powertrain.initialize(made(2)) as engine:
        engine.save_checkpoint(str(tmp_path / "run"))
    with pytest.raises(CheckpointMissing, match="load_checkpoint"):
        store(tmp_path / "run").open_weights()
    write(tmp_path / "two", state(made(1)))
    shutil.copy(tmp_path / "two/model.safetensors", tmp_path / "two/a.safetensors")
    assert store(tmp_path / "two").open_weights().tensors  # model.safetensors is the one
    (tmp_path / "two/model.safetensors").rename(tmp_path / "two/b.safetensors")
    with pytest.raises(CheckpointMissing, match="several") as caught:
        store(tmp_path / "two").open_weights()
    assert "a.safetensors, b.safetensors" in str(caught.value)
    assert store(tmp_path / "two/b.safetensors").open_weights().tensors


def test_damage_that_one_rank_sees_is_raised_on_all(tmp_path: Path, outcomes: Any, monkeypatch: Any) -> None:
    """Opening agrees between ranks."""
    write(tmp_path / "w", {"w": torch.zeros(4)})
    write(tmp_path / "other", {"w": torch.zeros(4), "v": torch.zeros(1)})

    def work(communicator: Any) -> None:
        place = "w" if communicator.rank == 0 else "missing"
        DirectoryStore(tmp_path / place, communicator).open_weights()

    assert all(isinstance(result, CheckpointMissing) for result in outcomes(2, work))

    def differ(communicator: Any) -> None:
        DirectoryStore(tmp_path / ("w" if communicator.rank else "other"), communicator).open_weights()

    results = outcomes(2, differ)
    assert all(isinstance(result, CheckpointError) and "different weights" in str(result) for result in results)


# --- a model library itself ----------------------------------------------------------------------


def test_a_transformers_model(tmp_path: Path) -> None:
    """A GPT-2 of transformers built deferred is the eager one, and takes what save_pretrained wrote."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=12)
    torch.manual_seed(1)
    eager = transformers.GPT2LMHeadModel(config)
    eager.save_pretrained(tmp_path / "w", max_shard_size="20kB")
    assert len(load_file(next((tmp_path / "w").glob("model-00001-of-*")))) > 0
    torch.manual_seed(1)
    with powertrain.deferred():
        model = transformers.GPT2LMHeadModel(config)
    with powertrain.initialize(model, loss_fn=lambda output, _: output.logits.sum()):
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), eager.state_dict().values(), strict=True)
        )
    torch.manual_seed(2)
    with powertrain.deferred():
        model = transformers.GPT2LMHeadModel(config)
    with powertrain.initialize(model, loss_fn=lambda output, _: output.logits.sum(), weights=tmp_path / "w"):
        tokens = torch.arange(10)[None]
        assert torch.equal(model.eval()(tokens).logits, eager.eval()(tokens).logits)
    base = transformers.GPT2Model(config)
    with powertrain.initialize(base, loss_fn=lambda output, _: output.sum(), weights=tmp_path / "w"):
        assert torch.equal(base.wte.weight, eager.transformer.wte.weight)
