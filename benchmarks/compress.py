"""What gradients cost and do by each method of [comm.compress]: bytes a step and rank, and the loss at the end.

    python benchmarks/compress.py [--steps 200] [--width 64] [--depth 4] [--modes NAME ...] [--json]

Four replicated ranks train examples/gpt's model on Python's standard library; the plugin `observe` counts what one
step sends (the last one). "paper" is what the method's format says: of 32 bits an element, onebit sends 1 and
a scale of 32 for each 256, int8 and int4 their bits and such a scale, topk 64 for each element that it keeps.
"""

from __future__ import annotations

import json
from typing import Any

from gpt_ranks import RANKS, last, launch, parse, train

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


def main() -> None:
    options = parse(__doc__ or "", MODES, steps=200)
    if options.worker:
        compress, optimizer, _ = MODES[options.worker[0]]
        train({"comm": {"compress": compress}, "optimizers": {}, "optimizer": {**optimizer, "clip": 1.0}}, options)
        return
    results: dict[str, dict[str, Any]] = {}
    if not options.json:
        print(f"{'method':18} {'bytes a step':>13} {'of fp32':>8} {'paper':>7} {'loss':>7}")
    for name in options.modes:
        result = results[name] = launch(__file__, name, options)
        moved = sum(result["bytes"].values())
        result["fp32"] = result["parameters"] * 4 * 2 * (RANKS - 1) // RANKS
        result["loss"] = last(result["losses"])
        if not options.json:
            share = f"{moved / result['fp32']:8.3f} {MODES[name][2]:7.3f}"
            print(f"{name:18} {moved:13,} {share} {result['loss']:7.3f}", flush=True)
    if options.json:
        print(json.dumps({"ranks": RANKS, "steps": options.steps, "results": results}, indent=1))


if __name__ == "__main__":
    main()
