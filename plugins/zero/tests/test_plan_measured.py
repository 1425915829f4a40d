"""What ``powertrain plan`` predicts, beside what training needs: fresh processes, their own high-water mark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from powertrain.testing.ports import free_port
from powertrain_zero.plan.command import Planner
from powertrain_zero.plan.model import build_model
from powertrain_zero.plan.probe import probe
from powertrain_zero.plan.settings import load_settings

EXAMPLE = Path(__file__).parents[3] / "examples/gpt"
ALLOWED = 0.15

TRAIN = """
import json, sys
from pathlib import Path
import torch, powertrain
sys.path.insert(0, sys.argv[1])
from model import GPT

sizes, config, samples = json.loads(sys.argv[2])
torch.set_num_threads(1)
with powertrain.deferred():
    model = GPT(**sizes)
with powertrain.initialize(model, config) as engine:
    for _ in range(3):
        tokens = torch.randint(256, (samples, sizes["sequence"] + 1))
        engine.train_step((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
status = Path("/proc/self/status").read_text().splitlines()
print("peak", next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""

WEIGH = """
from powertrain_zero.plan.probe import probe
from powertrain_zero.plan.settings import load_settings
import sys
print(probe(load_settings(sys.argv[1], [], 1)).process)
"""

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "replicated": (1, 64, {}),
    "replicated, two ranks, accumulation": (2, 64, {"batch": {"micro": 2, "accumulation": 2}}),
    "replicated, bf16": (1, 8, {"batch": {"micro": 1}, "precision": {"compute": "bf16"}}),
    "stage 1": (2, 64, {"zero": {"stage": 1}}),
    "stage 2, accumulation": (2, 64, {"zero": {"stage": 2}, "batch": {"micro": 2, "accumulation": 2}}),
    "stage 3": (2, 128, {"zero": {"stage": 3}}),
    "stage 2, optimizer on a disk": (2, 64, {"zero": {"stage": 2}, "offload": {"optimizer": "nvme", "path": "."}}),
    "stage 3, everything on a disk": (
        1,
        64,
        {
            "zero": {"stage": 3},
            "offload": {"optimizer": "nvme", "gradients": "nvme", "parameters": "nvme", "path": ".", "grain": 2**22},
        },
    ),
    "stage 3, bf16": (2, 8, {"zero": {"stage": 3}, "batch": {"micro": 1}, "precision": {"compute": "bf16"}}),
}
"""Ranks, sequence and tables. bf16 has few tokens: a processor without such arithmetic takes long."""


def toml(tables: dict[str, Any]) -> str:
    return "".join(
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for section, table in tables.items()
    )


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Weigh a process without tensors: this one has loaded pytest as well."""
    file = tmp_path_factory.mktemp("weigh") / "train.toml"
    file.write_text(toml({"optimizer": {"name": "adamw"}}))
    done = subprocess.run([sys.executable, "-c", WEIGH, str(file)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's high-water mark")
@pytest.mark.parametrize("name", CASES)
def test_the_predicted_peak_is_the_measured_one(name: str, process: int, tmp_path: Path) -> None:
    """The peak of the fullest rank is predicted within 15 %."""
    ranks, sequence, tables = CASES[name]
    sizes = {"sequence": sequence, "width": 576, "depth": 8, "heads": 8}
    tables = {"accelerator": {"use": "cpu"}, "batch": {"micro": 2}, "optimizer": {"name": "adamw"}, **tables}
    file = tmp_path / "train.toml"
    file.write_text(toml(tables))
    settings = load_settings(str(file), [], ranks)
    optimizer = attrs.evolve(probe(settings), process=process)
    planner = Planner(settings, build_model(f"{EXAMPLE / 'model.py'}:GPT", sizes), lambda: optimizer, None, None, {})
    predicted = planner.need(planner.now()).peak + planner.fixed
    samples = settings.batch.micro * settings.batch.accumulation
    measured = max(train(ranks, json.dumps([sizes, tables, samples])))
    print(f"{name}: measured {measured / 1e6:.0f} MB, predicted {predicted / 1e6:.0f} MB")
    assert predicted == pytest.approx(measured, rel=ALLOWED)


def train(ranks: int, case: str) -> list[int]:
    """Train as ranks of their own; return their peaks in bytes."""
    port = free_port()
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(EXAMPLE), case],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                 "LOCAL_WORLD_SIZE": str(ranks)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [one.communicate(timeout=280) for one in started]
    finally:
        for one in started:
            one.kill()
    assert all(one.returncode == 0 for one in started), outputs[0][1]
    return [int(out.split("peak")[-1]) for out, _ in outputs]
