"""What gradients cost and do by each method of [comm.compress]: bytes a step and rank, and the loss at the end.

    python benchmarks/compress.py [--steps 200] [--width 64] [--depth 4] [--modes NAME ...] [--json]

Four replicated ranks train examples/gpt's model on Python's standard library; the plugin `observe` counts what one
step sends (the last one). "paper" is what the method's format says: of 32 bits an element, onebit sends 1 and
a scale of 32 for each 256, int8 and int4 their bits and such a scale, topk 64 for each element that it keeps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
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
SCALE = 32 / 256

ADAM = {"name": "adamw", "lr": 3e-3}
FROZEN = {"name": "onebit_adam", "lr": 1e-3, "freeze_step": 60}
MODES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "exact": ({}, ADAM, 1.0),
    "int8": ({"method": "int8"}, ADAM, (8 + SCALE) / 32),
    "int8, no feedback": ({"method": "int8", "error_feedback": False}, ADAM, (8 + SCALE) / 32),
    "int4": ({"method": "int4"}, ADAM, (4 + SCALE) / 32),
    "int4, no feedback": ({"method": "int4", "error_feedback": False}, ADAM, (4 + SCALE) / 32),
    "topk 1 %": ({"method": "topk", "ratio": 0.01}, ADAM, 0.02),
    "onebit after 60": ({"method": "onebit", "after": 60}, ADAM, (1 + SCALE) / 32),
    "1-bit Adam, exact": ({}, FROZEN, 1.0),
    "1-bit Adam": ({"method": "optimizer"}, FROZEN, (1 + SCALE) / 32),
}
"""Name to [comm.compress], [optimizer], and the bytes on paper as a share of fp32's."""


def train(mode: str, steps: int, width: int, depth: int, corpus: Path) -> dict[str, Any]:
    """Train on this rank; return losses, and what the last step sent."""
    torch.manual_seed(0)
    compress, optimizer, _ = MODES[mode]
    config = {
        "observe": {"comm": True},
        "optimizers": {},
        "comm": {"compress": compress},
        "optimizer": {**optimizer, "clip": 1.0},
        "batch": {"micro": BATCH},
        "run": {"seed": 1},
        "data": {},
    }
    model = GPT(SEQUENCE, width=width, depth=depth, heads=width // 32)
    losses: list[float] = []
    before = 0
    with powertrain.initialize(model, config, TokenDataset(corpus, SEQUENCE)) as engine:

        def sent() -> int:
            return sum(row.bytes for row in engine.context.communicator.traffic())

        for batch in engine.loader or ():
            before = sent()
            losses.append(float(engine.train_step(batch)))
            if len(losses) == steps:
                break
        parts: Counter[str] = Counter()
        for row in engine.context.communicator.traffic():
            parts[f"{row.operation} {row.dimension}"] += row.bytes
        moved = sent() - before
    numel = sum(p.numel() for p in model.parameters())
    return {"losses": losses, "bytes": moved, "parameters": numel, "rank": engine.context.rank.index, "parts": parts}


def launch(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in one mode on fresh processes; return what rank 0 says."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "result.json"
        arguments = ["--worker", mode, str(output)]
        arguments += [f"--{key}={getattr(options, key)}" for key in ("steps", "width", "depth")]
        command = [str(Path(sys.executable).with_name("powertrain")), "launch", "--nproc", str(RANKS), __file__]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{mode}: the ranks ended with {done.returncode}\n{done.stdout}{done.stderr}")
        result: dict[str, Any] = json.loads(output.read_text())
        return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64, help="a multiple of 32")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="NAME", help=", ".join(MODES))
    parser.add_argument("--json", action="store_true", help="print figures as JSON, losses of every step included")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    corpus = standard_library(ROOT / "runs" / "corpus")
    if options.worker:
        mode, output = options.worker
        result = train(mode, options.steps, options.width, options.depth, corpus.train)
        if result.pop("rank") == 0:
            Path(output).write_text(json.dumps(result))
        return
    results: dict[str, dict[str, Any]] = {}
    if not options.json:
        print(f"{'method':18} {'bytes a step':>13} {'of fp32':>8} {'paper':>7} {'loss':>7}")
    for name in options.modes:
        result = results[name] = launch(name, options)
        result["fp32"] = result["parameters"] * 4 * 2 * (RANKS - 1) // RANKS
        result["loss"] = sum(result["losses"][-10:]) / len(result["losses"][-10:])
        if not options.json:
            share = result["bytes"] / result["fp32"]
            print(
                f"{name:18} {result['bytes']:13,} {share:8.3f} {MODES[name][2]:7.3f} {result['loss']:7.3f}", flush=True
            )
    if options.json:
        print(json.dumps({"ranks": RANKS, "steps": options.steps, "results": results}, indent=1))


if __name__ == "__main__":
    main()
