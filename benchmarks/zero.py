"""The stages of [zero] beside DeepSpeed's, FSDP2, DDP and ZeroRedundancyOptimizer: speed and memory of training a GPT.

    python benchmarks/zero.py [--model 34m|118m|tiny] [--precision fp32 bf16] [--accumulation 1 4]
        [--contenders NAME ...] [--rounds 6] [--steps 2] [--warmup 2] [--json PATH] [--profile]

All train the same weights on the same batches: 2 ranks of one thread each, gloo
on loopback, micro-batches of 2, fused AdamW, no clipping. Contenders that are
compared live at the same time, each in its own environment, and take turns of
a few steps; in each round the next one begins. So a machine whose speed changes
treats neighbours alike, and a ratio is the median of the rounds' ratios. As many
live at once as memory holds; ours run again with the peers that found no room.
`bound` is both ranks at once without any communication; of it, contenders that
shard the update are measured against a bound that updates half of the parameters.

bytes/parameter are those of all live tensors without the batch, just before the
optimizer's update and after the step. The loss of every step must agree between
contenders. zero_bench/contenders.py shows each of them.

Ctrl-C, or SIGTERM, prints the tables of what has been measured so far.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from zero_bench.contenders import CONTENDERS, OFFLOADED
from zero_bench.launch import Run, Setting, missing
from zero_bench.model import SIZES
from zero_bench.panel import Plan, compete, panels, room_for
from zero_bench.table import render

DEFAULT = [name for name in CONTENDERS if name != "fsdp2-once" and name not in OFFLOADED]


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
    parser.add_argument("--rounds", type=positive, default=6, help="turns of each contender")
    parser.add_argument("--steps", type=positive, default=2, help="steps in a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first turn")
    parser.add_argument("--alive", type=positive, metavar="N", help="contenders at once; default: what memory holds")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds after which a turn counts as failed")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write every turn")
    parser.add_argument("--profile", action="store_true", help="show where powertrain's processor time goes in a step")
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def measure(settings: Sequence[Setting], options: argparse.Namespace) -> tuple[list[Run], bool]:
    """Run everything; return what was measured, and whether all of it was before an interrupt."""
    plan = Plan(options.rounds, options.steps, options.warmup, options.timeout, options.profile)
    runs: list[Run] = []
    began, done = time.monotonic(), 0
    queue = [
        (setting, names)
        for setting in settings
        for names in panels(options.contenders, options.alive or room_for(setting))
    ]
    try:
        for number, (setting, names) in enumerate(queue):
            spent = time.monotonic() - began
            left = f"about {spent / done * (len(queue) - done) / 60:.0f} min left" if done else "time unknown"
            say(f"[{number + 1}/{len(queue)}] {setting}: {', '.join(names)} ({left})")
            for measured in compete(names, setting, plan, number * plan.rounds, say):
                runs += measured
            done += 1
    except KeyboardInterrupt:
        say(f"interrupted in panel {done + 1} of {len(queue)}")
        return runs, False
    return runs, True


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    options = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background, a shell lets SIGINT be ignored
        signal.signal(number, signal.default_int_handler)
    problem = missing(options.contenders)
    if problem is not None:
        say(f"zero.py: {problem}")
        return 2
    settings = [
        Setting(options.model, precision, accumulation)
        for precision in options.precision
        for accumulation in options.accumulation
    ]
    runs, complete = measure(settings, options)
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
    profiles = {(run.contender, run.setting): run.profile for run in runs if run.profile}
    for (contender, setting), profile in profiles.items():
        print(f"\n{contender}, {setting}: one step of rank 0\n{profile}")
    return int(any(run.error for run in runs)) if complete else 130


if __name__ == "__main__":
    sys.exit(main())
