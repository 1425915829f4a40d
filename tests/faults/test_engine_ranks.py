"""What a person sees when one rank of a training run goes another way than the others."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

TIMEOUT = 4  # seconds, of [communicator]

SCRIPT = f"""
import sys
import torch
import powertrain

fault = sys.argv[1]
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
config = {{"communicator": {{"timeout": {TIMEOUT}}}, "batch": {{"micro": 2}}}}
with powertrain.initialize(model, config, loss_fn=torch.nn.functional.mse_loss) as engine:
    for step in range(6):
        batch = torch.ones(2, 4), torch.ones(2, 1)
        if step == 3 and engine.data_rank == 1:
            if fault == "skips":
                engine.eval_step(batch)
                continue
            if fault == "raises":
                raise RuntimeError("the disk of rank one is on fire")
            if fault == "wrong batch":
                batch = torch.ones(3, 4), torch.ones(3, 1)
            if fault == "stops early":
                break
        engine.train_step(batch)
print("finished")
"""


def launch(tmp_path: Path, fault: str) -> tuple[subprocess.CompletedProcess[str], float]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "powertrain.cli", "launch", "--nproc", "2", str(script), fault]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    return done, time.monotonic() - began


@pytest.mark.parametrize("fault", ["skips", "stops early"])
def test_a_rank_that_goes_another_way_is_named(tmp_path: Path, fault: str) -> None:
    """A skipped or missing step ends the run, and names ranks, parameters and the lines of the script."""
    done, _ = launch(tmp_path, fault)
    assert done.returncode == 1, done.stderr
    assert "finished" not in done.stdout
    assert "PT50" in done.stderr
    assert "0.weight" in done.stderr  # the bucket's parameters
    assert "train.py:22" in done.stderr  # the line of the rank that went on
    if fault == "skips":
        assert "train.py:14" in done.stderr  # the line of the rank that went another way
    assert "rank 1" in done.stderr


def test_the_first_error_is_the_one_that_is_told(tmp_path: Path) -> None:
    """An exception on one rank ends the others, and its own traceback is shown."""
    done, seconds = launch(tmp_path, "raises")
    assert done.returncode == 1
    assert "the disk of rank one is on fire" in done.stderr
    assert "train.py" in done.stderr
    assert "rank 1" in done.stderr
    assert seconds < 60  # starting two processes and the 10 s that the others have to end


def test_a_mistake_on_one_rank_is_told_in_words(tmp_path: Path) -> None:
    """A batch of the wrong size on one rank is a message with its remedy, not a stack trace."""
    done, _ = launch(tmp_path, "wrong batch")
    assert done.returncode == 2, done.stderr
    assert "[PT400]" in done.stderr
    assert "2 = micro 2 x accumulation 1" in done.stderr
    assert "Traceback" not in done.stderr


WITHOUT_BLOCK = f"""
import torch
import powertrain

config = {{"communicator": {{"timeout": {TIMEOUT}}}, "batch": {{"micro": 2}}}}
engine = powertrain.initialize(torch.nn.Linear(4, 1), config, loss_fn=torch.nn.functional.mse_loss)
for step in range(6):
    if step == 3 and engine.data_rank == 1:
        raise RuntimeError("the disk of rank one is on fire")
    engine.train_step((torch.ones(2, 4), torch.ones(2, 1)))
"""


def test_the_error_is_told_to_all_without_a_with_block(tmp_path: Path) -> None:
    """The ranks learn of an exception even where no ``with`` block ends the engine."""
    script = tmp_path / "train.py"
    script.write_text(WITHOUT_BLOCK)
    command = [sys.executable, "-m", "powertrain.cli", "launch", "--nproc", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1
    told = done.stderr
    assert told.count("[rank 1] Traceback") == 1
    assert told.count("\nrank 1 raised:\nTraceback") == 1  # by rank 0
    assert "rank 1 raised RuntimeError: the disk of rank one is on fire" in told  # the error on rank 0
    assert "left the run" not in told
    assert "worker.py" not in told and "runpy" not in told
    last = told.splitlines()[-1]  # the ranks end at about the same time: the launcher sees one of them, or both
    assert "exited with code 1" in last
    assert "its message is above" in last
