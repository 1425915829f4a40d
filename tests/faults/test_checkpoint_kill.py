"""kill -9 during saves: the newest complete checkpoint always loads.

One process imports torch and is then forked for every kill, before it has
started any thread, so that fifty kills cost fifty forks and not fifty imports.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

KILLS = 50

HARNESS = """
import os, random, signal, sys, time
from pathlib import Path

import torch
import torch.distributed.checkpoint  # the planner, imported once for all forks

from powertrain.mesh import Mesh
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain.roles.communicator import SingleProcess
from powertrain_checkpoint.store import DirectoryStore

torch.set_num_threads(1)
root, kills, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
SHAPES = {"model/a": (700, 500), "model/b": (600, 511), "optimizer/a/m": (700, 500), "step": ()}


def store():
    return DirectoryStore(root, SingleProcess(Mesh.build(1, 0), torch.device("cpu")))


def saver(ready, step):
    # Saves for ever; every tensor is full of the step, so a mixture would show.
    own = store()
    while True:
        step += 1
        tensors = [
            TensorSlice(name, shape, torch.full(shape, float(step)).view(-1)) for name, shape in SHAPES.items()
        ]
        tag = "same" if mode == "overwrite" else f"step-{step}"
        snapshot = Snapshot(tensors=tensors, values={"step": step}, rank_values={})
        own.save(tag, snapshot, asynchronous=mode == "asynchronous")
        own.prune(3)
        if ready is not None:
            own.wait()
            os.write(ready, b"1")
            ready = None


def check():
    # Loads the newest complete checkpoint and returns its step.
    own = store()
    reader = own.open()
    step = reader.values["step"]
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    reader.read([TensorSlice(name, SHAPES[name], tensor.view(-1)) for name, tensor in tensors.items()])
    for name, tensor in tensors.items():
        assert bool((tensor == step).all()), (name, step)
    for tag in own.tags():
        own.open(tag)
    return step


def in_child(body, *arguments):
    child = os.fork()
    if child == 0:
        try:
            body(*arguments)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child


def checked(write):
    os.write(write, str(check()).encode())


chance = random.Random(int(sys.argv[4]))
newest, torn = 0, 0
for kill in range(kills):
    read, write = os.pipe()
    child = in_child(saver, write, newest)
    assert os.read(read, 1) == b"1"  # its first save is complete
    time.sleep(chance.uniform(0.0, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    torn += any(path.name.startswith(".") for path in root.iterdir())
    checker = in_child(checked, write)
    _, status = os.waitpid(checker, 0)
    assert status == 0, f"kill {kill}: the newest checkpoint does not load"
    step = int(os.read(read, 20))
    assert step > newest, f"kill {kill}: went back from {newest} to {step}"
    newest = step
    os.close(read)
    os.close(write)
print(f"{kills} kills, {torn} of them within a save, newest step {newest}")
assert torn >= kills // 5, torn
assert len([path for path in root.iterdir()]) <= 6, sorted(root.iterdir())
"""


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous", "overwrite"])
def test_the_newest_checkpoint_loads_after_every_kill(tmp_path, mode):
    """After each of 50 kills at random moments, the newest checkpoint loads, is no mixture and newer than before."""
    command = [sys.executable, "-c", HARNESS, str(tmp_path), str(KILLS), mode, "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
