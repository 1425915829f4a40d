"""The names of tensors, with and without torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import powertrain
from powertrain.names import global_name

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's compiler looks at it


class Net(nn.Module):
    """Two blocks with buffers, and a tied head; returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
        self.head = nn.Linear(3, 3)
        self.head.weight = self.blocks[0][0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


def plain() -> nn.Module:
    torch.manual_seed(3)
    return Net()


def wrapped_blocks() -> nn.Module:
    model = plain()
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="eager")
    return model


def wrapped_whole() -> nn.Module:
    compiled: nn.Module = torch.compile(plain(), backend="eager")
    return compiled


def batch() -> torch.Tensor:
    return torch.arange(12, dtype=torch.float32).view(4, 3).sin()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0._orig_mod.weight", "blocks.0.weight"),
        ("_orig_mod.blocks.0._orig_mod.weight", "blocks.0.weight"),
        ("_orig_mod", ""),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("blocks.0.weight", "blocks.0.weight"),
    ],
)
def test_a_global_name_has_no_wrapper(name: str, expected: str) -> None:
    """Whole components are left out, and nothing else."""
    assert global_name(name) == expected


@pytest.mark.parametrize("make", [wrapped_blocks, wrapped_whole])
def test_compiled_and_plain_models_share_checkpoints(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """A compiled model saves, streams and loads what the plain one does, parameters, buffers and tied names."""
    results = {}
    for number, (first, second) in enumerate([(plain, make), (make, plain)]):
        directory = str(tmp_path / str(number))
        with powertrain.initialize(first()) as engine:
            engine.train_step(batch())
            engine.save_checkpoint(directory)
            saved = {name: tensor.clone() for name, tensor in powertrain.stream(engine)}
        with powertrain.initialize(second()) as engine:
            engine.load_checkpoint(directory)
            results[number] = {name: tensor.clone() for name, tensor in powertrain.stream(engine)}
            engine.train_step(batch())
        assert list(saved) == list(results[number])
        assert all(torch.equal(saved[name], results[number][name]) for name in saved)
    assert [name for name in results[0] if name.startswith("head")] == ["head.bias"]
    assert all("_orig_mod" not in name for name in results[1])


@pytest.mark.parametrize("make", [wrapped_blocks, wrapped_whole])
def test_weights_fill_a_compiled_model(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Files with the plain model's names load into the compiled one, at birth and later."""
    from safetensors.torch import save_file

    source = plain()
    with torch.no_grad():
        for param in source.parameters():
            param.add_(1.0)
    content = {name: tensor for name, tensor in source.state_dict().items() if name != "head.weight"}
    save_file(content, tmp_path / "model.safetensors")
    with powertrain.deferred():
        model = make()
    with powertrain.initialize(model, weights=str(tmp_path)) as engine:
        born = {name: tensor.clone() for name, tensor in powertrain.stream(engine)}
        engine.train_step(batch())
        engine.load_weights(tmp_path)
        loaded = dict(powertrain.stream(engine))
        assert all(torch.equal(born[name], content[name]) for name in content)
        assert all(torch.equal(loaded[name], content[name]) for name in content)
