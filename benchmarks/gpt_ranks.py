"""What benchmarks of traffic share: four ranks that train examples/gpt's model, and count the bytes of the last step.

A benchmark starts itself on the ranks (`launch`), which train (`train`) and leave what rank 0 says in a file; the
plugin `observe` counts (`[observe] comm`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import powertrain
from powertrain_data.tokens import TokenDataset

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "gpt"))

from corpus import standard_library  # noqa: E402  # type: ignore[import-not-found]
from model import GPT  # noqa: E402  # type: ignore[import-not-found]

RANKS = 4
SEQUENCE = 64
BATCH = 4


def parse(description: str, modes: Iterable[str], steps: int) -> argparse.Namespace:
    """Return the command line's options; the ranks have `worker`: the mode, and where the result belongs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = list(modes)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--width", type=int, default=64, help="a multiple of 32")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--modes", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--json", action="store_true", help="print figures as JSON, losses of every step included")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    standard_library(ROOT / "runs" / "corpus")  # built once, before the ranks look for it
    return options


def launch(script: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in one mode on fresh processes; return what rank 0 says."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "result.json"
        arguments = ["--worker", mode, str(output)]
        arguments += [f"--{key}={getattr(options, key)}" for key in ("steps", "width", "depth")]
        command = [str(Path(sys.executable).with_name("powertrain")), "launch", "--nproc", str(RANKS), script]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{mode}: the ranks ended with {done.returncode}\n{done.stdout}{done.stderr}")
        result: dict[str, Any] = json.loads(output.read_text())
        return result


def train(config: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Be one of the ranks: train, and as rank 0 write losses and the last step's bytes by operation and dimension."""
    torch.manual_seed(0)
    common = {"observe": {"comm": True}, "batch": {"micro": BATCH}, "run": {"seed": 1}, "data": {}}
    corpus = standard_library(ROOT / "runs" / "corpus")
    model = GPT(SEQUENCE, width=options.width, depth=options.depth, heads=options.width // 32)
    parameters = sum(p.numel() for p in model.parameters())
    losses: list[float] = []
    before: Counter[str] = Counter()
    with powertrain.initialize(model, {**config, **common}, TokenDataset(corpus.train, SEQUENCE)) as engine:

        def sent() -> Counter[str]:
            totals: Counter[str] = Counter()
            for row in engine.context.communicator.traffic():
                totals[f"{row.operation} {row.dimension}"] += row.bytes
            return totals

        for batch in engine.loader or ():
            before = sent()
            losses.append(float(engine.train_step(batch)))
            if len(losses) == options.steps:
                break
        moved = sent() - before
        first = engine.context.rank.index == 0
    if first:
        Path(options.worker[1]).write_text(json.dumps({"losses": losses, "bytes": moved, "parameters": parameters}))


def last(losses: list[float]) -> float:
    """Return the mean of the last ten losses."""
    return sum(losses[-10:]) / len(losses[-10:])
