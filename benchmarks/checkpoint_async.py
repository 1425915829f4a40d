"""What a checkpoint every ten steps costs: no save, asynchronous and synchronous saves, taking turns.

Each turn is 30 steps of one GPT-like model in one process, with three saves
in it; the rows alternate so that a busy moment hits all of them, and medians
are compared. A save that is still under way when the next begins is waited
for, so a disk that cannot keep up shows.

    python benchmarks/checkpoint_async.py [--turns 5] [--directory DIR]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time

import torch

import powertrain

STEPS, EVERY = 30, 10
LIMIT = 1.10


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


def turn(engine: powertrain.Engine, batch: torch.Tensor, saves: bool) -> float:
    """Return the seconds of one turn."""
    begin = time.perf_counter()
    for step in range(STEPS):
        engine.train_step(batch)
        if saves and step % EVERY == 0:
            engine.save_checkpoint()
    return time.perf_counter() - begin


def main() -> int:
    """Measure, print the table, and return 1 if asynchronous saves cost more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5, help="turns per row")
    parser.add_argument("--directory", help="where to save; default: a temporary directory")
    options = parser.parse_args()
    batch = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(dir=options.directory) as root:
        rows = {
            "no save": (build(f"{root}/none", False), False),
            "asynchronous": (build(f"{root}/background", True), True),
            "synchronous": (build(f"{root}/foreground", False), True),
        }
        times: dict[str, list[float]] = {name: [] for name in rows}
        for number in range(options.turns + 1):
            for name, (engine, saves) in rows.items():
                taken = turn(engine, batch, saves)
                if saves:
                    engine.load_checkpoint()  # waits for the save under way, outside the measurement
                if number:  # the first turn warms up
                    times[name].append(taken)
        for engine, _ in rows.values():
            engine.close()
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    plain = medians["no save"]
    print(f"{'':14} {'ms/step':>8} {'ratio':>6}")
    for name, taken in medians.items():
        print(f"{name:14} {1e3 * taken / STEPS:8.1f} {taken / plain:6.3f}")
    held = medians["asynchronous"] <= LIMIT * plain
    print(f"an asynchronous save every {EVERY} steps: at most {LIMIT - 1:.0%} wanted, {'held' if held else 'NOT held'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
