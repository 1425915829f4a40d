"""One rank of one contender: python -m zero_bench.worker CONTENDER ... --channel FD, asked for steps in turns.

Messages through the channel are tuples: ("steps", n) is answered by the seconds
and losses of so many steps, ("finish", profile) by what the process holds.
"""

from __future__ import annotations

import argparse
import os
import time
from multiprocessing.connection import Connection
from typing import Any

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
    parser.add_argument("--channel", type=int, required=True)
    options = parser.parse_args()

    channel: Connection[Any, Any] = Connection(options.channel)
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), SIZES[options.model]
    contender = CONTENDERS[options.contender]
    job = Job(
        options.precision, options.accumulation, contender.stage, contender.away, os.environ.get("BENCH_PATH", "")
    )
    step = contender.start(build(size), job)
    channel.send({"start_rss": peak_rss()})
    done = 0
    while True:
        request, argument = channel.recv()
        if request == "finish":
            break
        seconds, losses = [], []
        job.update_seconds.clear()
        moved = job.moved()
        used = time.process_time()
        for index in range(done, done + argument):
            tokens = batch(size, options.accumulation, index, rank)
            if not contender.synchronous:
                dist.barrier()  # untimed: both ranks compute at the same time
            began = time.perf_counter()
            losses.append(step(tokens))
            seconds.append(time.perf_counter() - began)
        done += argument
        used = (time.process_time() - used) / argument
        report = {"seconds": seconds, "update_seconds": list(job.update_seconds), "losses": losses}
        moved = (job.moved() - moved) // argument
        channel.send({**report, "processor_seconds": used, "peak_rss": peak_rss(), "moved": moved})
    tokens = batch(size, options.accumulation, done, rank)
    at_update, after = held(step, tokens)
    shown = profile(step, tokens) if argument else ""
    channel.send({"bytes_at_update": at_update, "bytes_after": after, "profile": shown})


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
