"""What each mode of [zero] sends: bytes a step and rank, by operation and dimension, and the loss it ends with.

    python benchmarks/zero_wire.py [--steps 60] [--width 64] [--depth 4] [--modes NAME ...] [--json]

Four ranks on gloo, two to a node (`node = 2`), train examples/gpt's model in bf16 on Python's standard
library; the plugin `observe` counts (`[observe] comm`), over the last step. Everything is compared
with the 3M elements of ZeRO-3 in fp16: parameters gathered in forward and in backward, gradients reduced, each
(n - 1) / n of the model from every rank. ZeRO++ (arXiv 2306.10209) says: qwZ takes a gather to half, hpZ
backward's gathers to none between nodes, and qgZ (int4) gradients to a quarter: 3M becomes 0.75M.

`between` counts what crosses nodes: along `data` that is the share of a rank's peers that sit on other nodes.
Our ZeRO-3 is a little below 1.00: what backward needs first stays, and is not gathered again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from gpt_ranks import RANKS, last, launch, parse, train

NODE = 2

MODES: dict[str, dict[str, Any]] = {
    "ZeRO-3": {},
    "qwZ": {"gather": "int8"},
    "hpZ": {"secondary": NODE},
    "qgZ int8": {"reduce": "int8", "node": NODE},
    "qgZ int4": {"reduce": "int4", "node": NODE},
    "qwZ + hpZ + qgZ int8": {"gather": "int8", "secondary": NODE, "reduce": "int8", "node": NODE},
    "qwZ + hpZ + qgZ int4": {"gather": "int8", "secondary": NODE, "reduce": "int4", "node": NODE},
    "MiCS": {"shard_group": NODE},
}


def between_nodes(moved: Mapping[str, int]) -> float:
    """Return the bytes that leave the node: all across, none within, and of the rest the share of far peers."""
    far = (RANKS - NODE) / (RANKS - 1)
    share = {f"data.within{NODE}": 0.0, f"data.across{NODE}": 1.0, "data": far}
    return sum(nbytes * share[key.split()[1]] for key, nbytes in moved.items())


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mode's figures, as shares of what ZeRO-3 sends in fp16."""
    one = result["parameters"] * 2 * (RANKS - 1) / RANKS  # M: the model once, in fp16
    moved = result["bytes"]
    gathers = sum(nbytes for key, nbytes in moved.items() if key.startswith("all_gather"))
    inside = sum(moved.values())
    return {
        "bytes": moved,
        "total": inside,
        "total_M": inside / one,
        "gathers_M": gathers / one,
        "gradients_M": (inside - gathers) / one,
        "between_M": between_nodes(moved) / (one * (RANKS - NODE) / (RANKS - 1)),
        "loss": last(result["losses"]),
    }


def show(results: Mapping[str, Mapping[str, Any]], reference: str) -> None:
    print(
        f"{'mode':22} {'gathers':>8} {'gradients':>10} {'total':>7} {'between':>8} {'loss':>7} {'to ' + reference:>10}"
    )
    print(f"{'fp16 ZeRO-3, on paper':22} {2:8.2f} {1:10.2f} {3:7.2f} {3:8.2f}")
    for name, row in results.items():
        shares = f"{row['gathers_M']:8.2f} {row['gradients_M']:10.2f} {row['total_M']:7.2f} {row['between_M']:8.2f}"
        print(f"{name:22} {shares} {row['loss']:7.3f} {row['loss'] / results[reference]['loss'] - 1:+10.2%}")
    print("\nbytes a step and rank:")
    for name, row in results.items():
        for key, nbytes in sorted(row["bytes"].items(), key=lambda item: -item[1]):
            print(f"{name:22} {key:32} {nbytes:12,}")


def main() -> None:
    options = parse(__doc__ or "", MODES, steps=60)
    if options.worker:
        train(
            {
                "zero": {"stage": 3, **MODES[options.worker[0]]},
                "precision": {"compute": "bf16", "reduce": "bf16"},
                "optimizer": {"lr": 3e-3, "clip": 1.0},
            },
            options,
        )
        return
    results: dict[str, dict[str, Any]] = {}
    for name in options.modes:
        print(f"{name} …", file=sys.stderr, flush=True)
        result = launch(__file__, name, options)
        results[name] = summary(result) | {"losses": result["losses"]}
    if options.json:
        sizes = {key: getattr(options, key) for key in ("steps", "width", "depth")}
        print(json.dumps({"ranks": RANKS, "node": NODE, **sizes, "results": results}, indent=1))
    else:
        show(results, "ZeRO-3" if "ZeRO-3" in results else options.modes[0])


if __name__ == "__main__":
    main()
