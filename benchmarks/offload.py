"""State in host memory and on a disk beside DeepSpeed's ZeRO-Offload and ZeRO-Infinity: speed and memory.

    python benchmarks/offload.py [--model 118m|34m|tiny] [--path DIR] [--rounds 4] [--steps 2] [--json PATH]

Both train the same weights on the same batches: 2 ranks of one thread each, gloo on loopback, micro-batches of 2, fp32,
no clipping; DeepSpeed with its own CPU Adam and its aio. The two of a pair live at the same time, each in its own
environment, and take turns of a few steps; a ratio is the median of the rounds' ratios. The loss of every step must
agree.

For a disk, a step's limit is the larger of what it computes (the same stage in memory, in the same rounds) and of
what it moves, divided by what the disk gives the same engine for such a mix of reads and writes, in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from zero_bench.contenders import OFFLOADED
from zero_bench.launch import Contestant, Failed, Run, Setting, missing, tokens_a_step
from zero_bench.model import SIZES, parameters

FASTER = 1.2
"""Tokens/s, at least, of DeepSpeed's."""

SLACK = 1.15
"""A step on a disk takes at most so many times its limit, and what one unit computes."""

PAIRS = {name.removeprefix("powertrain-"): f"deepspeed{name.removeprefix('powertrain')}"
         for name in OFFLOADED if name.startswith("powertrain")}  # fmt: skip

RAW = """
import sys, time
from powertrain_offload import io
path, nbytes, grain = sys.argv[1], int(sys.argv[2]), 64 * 2**20
with io.open_engine("auto") as engine, engine.open(path, "create") as file:
    file.resize(nbytes)
    buffers = [engine.buffer(grain) for _ in range(4)]
    for start in range(0, nbytes, grain):
        file.write(start, buffers[0]).wait()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    under_way = []
    for number, start in enumerate(range(0, nbytes, grain)):
        under_way.append((file.write if number % 2 else file.read)(start, buffers[number % 4]))
        if len(under_way) == 4:
            under_way.pop(0).wait()
    for transfer in under_way:
        transfer.wait()
    print(time.perf_counter() - began, flush=True)
"""


def raw_bandwidth(path: Path, ranks: int = 2, nbytes: int = 2**30) -> float:
    """Return what as many processes as there are ranks move together, half of it reads and half writes, in bytes/s."""
    names = [path / f"raw-{rank}" for rank in range(ranks)]
    command = [sys.executable, "-c", RAW]
    workers = [
        subprocess.Popen([*command, str(name), str(nbytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        seconds = [float(worker.stdout.readline()) for worker in workers if worker.stdout is not None]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for name in names:
            name.unlink(missing_ok=True)
    return ranks * nbytes / max(seconds)


def compete(names: Sequence[str], setting: Setting, options: argparse.Namespace) -> tuple[list[Run], list[float]]:
    """Let contenders take turns; return what was measured, and the disk's speed in each round."""
    alive: dict[str, Contestant] = {}
    runs: list[Run] = []
    speeds: list[float] = []

    def turn(name: str, steps: int, number: int) -> None:
        try:
            run = alive[name].turn(steps, number)
        except Failed as failure:
            say(f"    {name} FAILED: {failure}")
            alive.pop(name).end()
            runs.append(Run(name, setting, number, error=str(failure)))
        else:
            if number >= 0:
                runs.append(run)

    try:
        for name in names:
            try:
                alive[name] = Contestant(name, setting, options.timeout)
            except Failed as failure:
                say(f"    {name} FAILED: {failure}")
                runs.append(Run(name, setting, 0, error=str(failure)))
                continue
            turn(name, options.warmup, -1)
        for number in range(options.rounds):
            order = list(alive)
            place = number % max(1, len(order))
            for name in [*order[place:], *order[:place]]:
                turn(name, options.steps, number)
            if any("nvme" in name for name in names):
                speeds.append(raw_bandwidth(options.path))
            last = {run.contender: run.step_seconds for run in runs if run.round == number and not run.error}
            shown = ", ".join(f"{name} {seconds:.2f}" for name, seconds in last.items())
            disk = f", the disk {speeds[-1] / 1e9:.2f} GB/s" if speeds else ""
            say(f"    round {number + 1} of {options.rounds}, seconds a step: {shown}{disk}")
        losses = {name: tuple(contestant.losses) for name, contestant in alive.items()}
    finally:
        for contestant in alive.values():
            contestant.end()
    check_losses(losses)
    return runs, speeds


def check_losses(losses: dict[str, tuple[float, ...]]) -> None:
    """Say if contenders did not compute the same."""
    for step in zip(*losses.values(), strict=False):
        if max(step) - min(step) > 1e-4 * abs(max(step)):
            say(f"    LOSSES DIFFER: {dict(zip(losses, step, strict=True))}")
            return


def render(kind: str, runs: Sequence[Run], speeds: Sequence[float], setting: Setting) -> str:
    """Return the table of one pair."""
    lines = [f"{kind}: {'contender':22} {'tokens/s':>9} {'min - max':>13} {'peak RSS MB':>12} {'GB moved a step':>16}"]
    mine = {run.contender: [r for r in runs if r.contender == run.contender and not r.error] for run in runs}
    for name, good in mine.items():
        if not good:
            lines.append(f"  {name:28} FAILED: {next(r.error for r in runs if r.contender == name and r.error)}")
            continue
        rates = [tokens_a_step(setting) / run.step_seconds for run in good]
        lines.append(
            f"  {name:28} {statistics.median(rates):9.0f} {f'{min(rates):.0f} - {max(rates):.0f}':>13}"
            f" {max(run.peak_rss for run in good) / 1e6:12.0f} {good[-1].moved / 1e9:16.2f}"
        )
    ours, theirs, memory = f"powertrain-{kind}", PAIRS[kind], "powertrain-3"
    ratio = paired(mine.get(ours, []), mine.get(theirs, []))
    if ratio is not None:
        lines.append(f"  tokens/s of DeepSpeed's: {ratio:.2f} (bar {FASTER}: {'met' if ratio >= FASTER else 'MISSED'})")
    if speeds and mine.get(ours) and mine.get(memory):
        lines.append(limit(mine[ours], mine[memory], speeds, setting))
    return "\n".join(lines)


def paired(ours: Sequence[Run], theirs: Sequence[Run]) -> float | None:
    """Return the median over the rounds of theirs / ours in time: neighbours in time share the machine's moods."""
    other = {run.round: run.step_seconds for run in theirs}
    ratios = [other[run.round] / run.step_seconds for run in ours if run.round in other]
    return statistics.median(ratios) if ratios else None


def limit(ours: Sequence[Run], memory: Sequence[Run], speeds: Sequence[float], setting: Setting) -> str:
    """Return the two terms of a step's limit, and how the step compares."""
    compute = statistics.median(run.step_seconds for run in memory)
    transfer = statistics.median(run.moved / speeds[run.round] for run in ours)
    unit = compute / (SIZES[setting.model].depth + 1)
    step, bar = statistics.median(run.step_seconds for run in ours), SLACK * max(compute, transfer) + unit
    return (
        f"  a step {step:.2f} s; in memory {compute:.2f} s; bytes / bandwidth {transfer:.2f} s"
        f" ({ours[-1].moved / 1e9:.2f} GB at {statistics.median(speeds) / 1e9:.2f} GB/s);"
        f" bar {SLACK} x the larger + {unit:.2f} = {bar:.2f} s: {'met' if step <= bar else 'MISSED'}"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="118m")
    parser.add_argument("--kinds", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="KIND", help=" ".join(PAIRS))
    parser.add_argument("--path", type=Path, default=Path(), help="a directory on the disk to use")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first turn")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds after which a turn counts as failed")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write every turn")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    setting = Setting(options.model, "fp32", 1)
    problem = missing([*PAIRS.values()])
    if problem is not None:
        say(f"offload.py: {problem}")
        return 2
    print(f"{setting}: {parameters(SIZES[options.model]):,} parameters, {tokens_a_step(setting)} tokens a step")
    every: list[Run] = []
    with tempfile.TemporaryDirectory(dir=options.path, prefix="offload-bench-") as directory:
        options.path = Path(directory).absolute()
        os.environ["BENCH_PATH"] = str(options.path)
        os.environ["PATH"] = (
            f"{Path(__file__).parents[1] / '.peers' / 'deepspeed' / 'bin'}:{os.environ['PATH']}"  # ninja
        )
        for kind in options.kinds:
            say(f"{kind}:")
            names = [PAIRS[kind], f"powertrain-{kind}", *(["powertrain-3"] if "nvme" in kind else [])]
            runs, speeds = compete(names, setting, options)
            every += runs
            print(render(kind, runs, speeds, setting), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([run.as_json() for run in every], indent=1) + "\n")
    return int(any(run.error for run in every))


if __name__ == "__main__":
    sys.exit(main())
