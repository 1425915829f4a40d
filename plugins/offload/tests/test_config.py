"""Mistakes in ``[offload]`` are told when the file is read, or when the engine is built: never by a traceback."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import powertrain
from powertrain.errors import ConfigError, ShardingError
from powertrain_offload.config import OffloadConfig


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    """An engine that was refused has given its files up, before anybody collects garbage."""
    before = swap_files()
    yield
    after = swap_files()
    gc.collect()
    assert not after - before


def swap_files() -> set[str]:
    """Return the names of the swap files that this process has open."""
    place = Path("/proc/self/fd")
    names = {str(path.readlink()) for path in place.iterdir() if path.is_symlink()} if place.exists() else set()
    return {name for name in names if "powertrain-swap" in name}


def initialize(config: dict[str, Any]) -> powertrain.Engine:
    return powertrain.initialize(torch.nn.Linear(4, 1), config, loss_fn=torch.nn.functional.mse_loss)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"optimizer": "nvme"}, 'optimizer = "nvme" needs path'),
        ({"activations": "nvme"}, 'activations = "nvme" needs path'),
        ({"ratio": 0.5}, 'ratio needs optimizer = "host" or "nvme"'),
        ({"delayed": True}, 'delayed needs optimizer = "host" or "nvme"'),
        ({"optimizer": "disk"}, "offload.optimizer"),
        ({"optimizer": "host", "ratio": 0.0}, "offload.ratio"),
        ({"optimizer": "host", "ratio": 1.5}, "offload.ratio"),
        ({"block": 1000}, "offload.block"),
        ({"grain": 4097}, "offload.grain"),
        ({"depth": 0}, "offload.depth"),
        ({"threads": 0}, "offload.threads"),
        ({"buffers": 1000}, "offload.buffers"),
        ({"path": ""}, "offload.path"),
        ({"path": ["/a", ""]}, "offload.path"),
        ({"path": []}, "offload.path"),
        ({"engine": "fast"}, "offload.engine"),
        ({"pth": "/a"}, "offload.pth"),
    ],
)
def test_a_table_that_cannot_be_right(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        initialize({"zero": {"stage": 3}, "offload": table})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "table", "what"),
    [(1, "gradients", "gradients"), (2, "parameters", "parameters"), (1, "parameters", "parameters")],
)
def test_a_stage_that_keeps_it_whole(tmp_path: Path, stage: int, table: str, what: str) -> None:
    with pytest.raises(ShardingError) as caught:
        initialize({"zero": {"stage": stage}, "offload": {table: "nvme", "path": str(tmp_path)}})
    assert f"{what} stay whole on every rank at stage {stage}" in caught.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keys", [("optimizer",), ("optimizer", "gradients"), ("parameters",)])
def test_a_table_that_nobody_asks_about(tmp_path: Path, keys: tuple[str, ...]) -> None:
    """Without [zero], nothing would leave the device."""
    with pytest.raises(ShardingError) as caught:
        initialize({"offload": dict.fromkeys(keys, "nvme") | {"path": str(tmp_path)}})
    assert " and ".join(keys) in caught.value.message
    assert caught.value.where == f"offload.{keys[0]}"
    assert "[zero]" in caught.value.remedy


def test_a_table_of_activations_needs_no_sharding(tmp_path: Path) -> None:
    with initialize({"offload": {"activations": "nvme", "path": str(tmp_path)}}) as engine:
        engine.train_step((torch.ones(2, 4), torch.ones(2, 1)))
    assert not list(tmp_path.iterdir())


def test_an_empty_table_changes_nothing() -> None:
    with initialize({"offload": {}}) as engine:
        engine.train_step((torch.ones(2, 4), torch.ones(2, 1)))


def test_what_a_table_says() -> None:
    table = OffloadConfig(optimizer="host", parameters="nvme", path=["/a", "/b"])
    assert table.places == {"host", "nvme", "device"}
    assert table.paths == ["/a", "/b"]
    assert OffloadConfig(path="/a").paths == ["/a"]
    assert OffloadConfig().paths == []


@pytest.mark.parametrize(
    ("table", "words"),
    [('optimizer = "nvme"', "needs path"), ("ratio = 0.5", "ratio needs"), ('optimizer = "ssd"', "offload.optimizer")],
)
def test_the_command_tells_it_without_a_traceback(tmp_path: Path, table: str, words: str) -> None:
    (tmp_path / "train.toml").write_text(f"[zero]\nstage = 3\n\n[offload]\n{table}\n")
    command = [sys.executable, "-m", "powertrain.cli", "config", "check", "train.toml", "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
