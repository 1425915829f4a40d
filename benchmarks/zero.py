"""The stages of [zero] beside DeepSpeed's, FSDP2, DDP and ZeroRedundancyOptimizer: speed and memory of training a GPT.

    python benchmarks/zero.py [--model 34m|118m|tiny] [--precision fp32 bf16] [--accumulation 1 4]
        [--contenders NAME ...] [--rounds 3] [--steps 8] [--warmup 3] [--json PATH] [--profile]

All train the same weights on the same batches: 2 ranks of one thread each, gloo
on loopback, micro-batches of 2, fused AdamW, no clipping. In each round every
contender runs once, on fresh processes in its own environment, one after the
other; medians are compared. `bound` is both ranks at once without any
communication; of it, contenders that shard the update are measured against a
bound that updates half of the parameters.

bytes/parameter are those of all live tensors without the batch, just before the
optimizer's update and after the step. The loss of every step must agree between
contenders. zero_bench/contenders.py shows each of them.

Ctrl-C prints the tables of what has been measured so far.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from zero_bench.contenders import CONTENDERS
from zero_bench.launch import Plan, Run, Setting, launch, missing
from zero_bench.model import SIZES
from zero_bench.table import render

DEFAULT = [name for name in CONTENDERS if name != "fsdp2-once"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="34m")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--accumulation", nargs="+", type=positive, default=[1, 4], metavar="N")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT, metavar="NAME", help=" ".join(CONTENDERS)
    )
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=8, help="steps that count, in each run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds after which a run counts as failed")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write every run")
    parser.add_argument("--profile", action="store_true", help="show where powertrain's processor time goes in a step")
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def measure(queue: Sequence[tuple[Setting, int, str]], options: argparse.Namespace) -> list[Run]:
    """Run everything in turn; return what was measured when it is through or interrupted."""
    runs: list[Run] = []
    seconds: dict[tuple[str, Setting], float] = {}
    try:
        for done, (setting, number, name) in enumerate(queue):
            known = [seconds.get((one, where)) for where, _, one in queue[done:]]
            mean = sum(seconds.values()) / len(seconds) if seconds else None
            left = f"about {sum(one or mean for one in known) / 60:.0f} min left" if mean else "time unknown"
            say(f"[{done + 1}/{len(queue)}] {setting}, round {number + 1}: {name} ({left})")
            began = time.monotonic()
            profiled = options.profile and CONTENDERS[name].ours and number + 1 == options.rounds
            run = launch(name, setting, number, Plan(options.steps, options.warmup, options.timeout, profiled))
            seconds[name, setting] = time.monotonic() - began
            if run.error:
                say(f"    FAILED: {run.error}")
            runs.append(run)
    except KeyboardInterrupt:
        say(f"interrupted after {len(runs)} of {len(queue)} runs")
    return runs


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    options = arguments()
    problem = missing(options.contenders)
    if problem is not None:
        say(f"zero.py: {problem}")
        return 2
    settings = [
        Setting(options.model, precision, accumulation)
        for precision in options.precision
        for accumulation in options.accumulation
    ]
    queue = [
        (setting, number, name)
        for setting in settings
        for number in range(options.rounds)
        for name in dict.fromkeys(options.contenders)
    ]
    runs = measure(queue, options)
    machine = {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{key: getattr(options, key) for key in ("rounds", "steps", "warmup")},
    }
    if options.json is not None:
        text = json.dumps({"machine": machine, "runs": [run.as_json() for run in runs]}, indent=1)
        options.json.write_text(text + "\n")
    for setting in settings:
        if any(run.setting == setting for run in runs):
            print(render(setting, runs), end="\n\n")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for run in runs:
        if run.profile:
            print(f"\n{run.contender}, {run.setting}: one step of rank 0\n{run.profile}")
    return 130 if len(runs) < len(queue) else int(any(run.error for run in runs))


if __name__ == "__main__":
    sys.exit(main())
