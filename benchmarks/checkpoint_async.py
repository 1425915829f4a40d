"""What a checkpoint every ten steps costs, asynchronous and synchronous, beside torch's own saves.

Each turn is 20 steps of one GPT-like model, with two saves in it; the rows
alternate so that a busy moment hits all of them, and medians are compared. A
save that is still under way when the next begins is waited for, so a disk
that cannot keep up shows. With several ranks each has one thread.

    python benchmarks/checkpoint_async.py [--ranks 2] [--turns 7] [--directory DIR]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoint

import powertrain

STEPS, EVERY = 20, 10
LIMIT = 1.05


class Model(torch.nn.Module):
    """A byte-level transformer of about 3 million parameters that returns its loss."""

    def __init__(self, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, width)
        layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of predicting each token of (batch, length) from itself."""
        logits = self.head(self.blocks(self.embed(tokens)))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def build(directory: str, asynchronous: bool) -> powertrain.Engine:
    """Return an engine that saves into ``directory``."""
    config = {"checkpoint": {"directory": directory, "asynchronous": asynchronous, "keep_last": 2}}
    torch.manual_seed(0)
    return powertrain.initialize(Model(), config=config)


class Peer:
    """torch's own saves of the same state: ``torch.save``, or torch.distributed.checkpoint in the background."""

    def __init__(self, directory: str, asynchronous: bool) -> None:
        self.directory, self.asynchronous = directory, asynchronous
        self.pending: Future[object] | None = None

    def save(self, engine: powertrain.Engine) -> None:
        """Save, after the save before has ended."""
        self.wait()
        state = {"model": engine.module.state_dict(), "optimizer": engine.optimizer_wrapper.optimizer.state_dict()}
        path = f"{self.directory}/{engine.global_step % 2}"
        if self.asynchronous:
            pending = checkpoint.async_save(state, checkpoint_id=path, storage_writer=writer(path))
            self.pending = pending if isinstance(pending, Future) else pending.upload_completion
            return
        Path(self.directory).mkdir(exist_ok=True)
        with Path(f"{path}-{engine.context.rank.index}").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def wait(self) -> None:
        """Wait for the save under way."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None


def writer(path: str) -> checkpoint.FileSystemWriter:
    """Return torch's writer, which syncs to the disk as ours does."""
    return checkpoint.FileSystemWriter(path, sync_files=True, overwrite=True)


def turn(engine: powertrain.Engine, batch: torch.Tensor, save: Callable[[powertrain.Engine], object]) -> float:
    """Return the seconds of one turn."""
    begin = time.perf_counter()
    for step in range(STEPS):
        engine.train_step(batch)
        if step % EVERY == 0:
            save(engine)
    return time.perf_counter() - begin


def main() -> int:
    """Measure, print the table, and return 1 if asynchronous saves cost more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=7, help="turns per row")
    parser.add_argument("--batch", type=int, nargs=2, default=(16, 128), help="sequences and bytes of a step")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--directory", help="where to save; default: a temporary directory")
    parser.add_argument("--root", help=argparse.SUPPRESS)  # what the ranks share
    options = parser.parse_args()
    if options.ranks > 1 and options.root is None:
        with tempfile.TemporaryDirectory(dir=options.directory) as root:
            command = [sys.executable, "-m", "powertrain.cli", "launch", "--nproc", str(options.ranks), __file__]
            return subprocess.run([*command, *sys.argv[1:], "--root", root], check=False).returncode
    if options.ranks > 1:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        return measure(options, options.root or root)


def measure(options: argparse.Namespace, root: str) -> int:
    """Be a rank, or all there is: measure, and print on the first."""
    warnings.filterwarnings("ignore", module="torch")
    batch = torch.randint(256, tuple(options.batch), generator=torch.Generator().manual_seed(0))
    background, foreground = Peer(f"{root}/dcp", True), Peer(f"{root}/torch", False)
    rows: dict[str, tuple[powertrain.Engine, Callable[[powertrain.Engine], object], Callable[[], object]]] = {}
    for name, asynchronous in (("powertrain, asynchronous", True), ("powertrain, synchronous", False)):
        engine = build(f"{root}/{name}", asynchronous)
        rows[name] = engine, powertrain.Engine.save_checkpoint, engine.load_checkpoint
    rows["torch async_save"] = build(f"{root}/unused", False), background.save, background.wait
    rows["torch.save + fsync"] = build(f"{root}/unused", False), foreground.save, foreground.wait
    rows["no save"] = build(f"{root}/unused", False), lambda _: None, lambda: None
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(options.turns + 1):
        for name, (engine, save, drain) in rows.items():
            taken = turn(engine, batch, save)
            drain()  # the last save of the turn, outside the measurement: the next turn is another row's
            if number:  # the first turn warms up
                times[name].append(taken)
    rank = next(iter(rows.values()))[0].context.rank.index
    for engine, _, _ in rows.values():
        engine.close()
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    plain = medians["no save"]
    held = medians["powertrain, asynchronous"] <= LIMIT * plain
    if rank:
        return 0
    print(f"{'a save every ' + str(EVERY) + ' steps':26} {'ms/step':>8} {'ratio':>6}")
    for name, taken in medians.items():
        print(f"{name:26} {1e3 * taken / STEPS:8.1f} {taken / plain:6.3f}")
    print(f"asynchronous saves may add {LIMIT - 1:.0%}: {'met' if held else 'MISSED'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
