"""One rank of one contender: torchrun -m zero_bench.worker CONTENDER ... writes <out>/rank<r>.json."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from zero_bench.contenders import CONTENDERS, Job, Step
from zero_bench.measure import live_bytes, peak_rss
from zero_bench.model import SIZES, batch, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--model", choices=SIZES, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--accumulation", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), SIZES[options.model]
    contender = CONTENDERS[options.contender]
    job = Job(options.precision, options.accumulation, contender.stage)
    began = time.perf_counter()
    step = contender.start(build(size), job)
    start_seconds, start_rss = time.perf_counter() - began, peak_rss()

    seconds, losses = [], []
    for index in range(options.warmup + options.steps):
        tokens = batch(size, options.accumulation, index, rank)
        if not contender.synchronous:
            dist.barrier()  # untimed: both ranks compute at the same time
        began = time.perf_counter()
        losses.append(step(tokens))
        seconds.append(time.perf_counter() - began)
    result = {
        **asdict(job),
        "seconds": seconds[options.warmup :],
        "update_seconds": job.update_seconds[options.warmup :],
        "losses": losses,
        "start_seconds": start_seconds,
        "start_rss": start_rss,
        "peak_rss": peak_rss(),  # before the steps below, which look at memory and time
    }
    tokens = batch(size, options.accumulation, len(losses), rank)
    result["bytes_at_update"], result["bytes_after"] = held(step, tokens)
    if options.profile:
        result["profile"] = profile(step, tokens)
    options.out.joinpath(f"rank{rank}.json").write_text(json.dumps(result))


def held(step: Step, tokens: torch.Tensor) -> tuple[int | None, int]:
    """Run a step; return the bytes of live tensors just before its update, and after it, without the tokens.

    The first is None when the update calls no torch optimizer.
    """
    seen: list[int] = []
    hook = register_optimizer_step_pre_hook(lambda *_: seen.append(live_bytes() - tokens.nbytes))
    step(tokens)
    hook.remove()
    return max(seen, default=None), live_bytes() - tokens.nbytes


def profile(step: Step, tokens: torch.Tensor) -> str:
    """Run a step under torch's profiler; return where this rank's processor spent it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        step(tokens)
    return record.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60)


if __name__ == "__main__":
    main()
