"""Trains a GPT of 1.0 billion parameters in 6 GB: `python examples/larger_than_memory/train.py`.

In memory its training state is 16 GB (parameters, gradients and Adam's two moments in fp32). The limit is the
operating system's: a process that asks for more gets a MemoryError.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "gpt"))  # the model of the first example

import torch
from model import GPT

import powertrain

SEQUENCE = 128
GB = 10**9


def batches(steps: int, vocabulary: int = 256) -> list[dict[str, torch.Tensor]]:
    """Return the first window of this file's own text, again and again: a few steps lower its loss."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    starts = [0] * steps
    return [
        {"tokens": text[start : start + SEQUENCE][None], "targets": text[start + 1 : start + SEQUENCE + 1][None]}
        for start in starts
    ]


def limit_memory(gigabytes: float) -> None:
    """Let the system refuse this process more memory of its own than this: heap, buffers and stacks together."""
    # Large blocks go back to the system when they are freed, and do not count any more.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 * 2**20))
    nbytes = int(gigabytes * GB)
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))


def peak() -> float:
    """Return the most memory that this process had at once, in GB: everything resident, libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).with_name("train.toml")), help="TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of it")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048, help="of the model")
    parser.add_argument("--depth", type=int, default=20, help="blocks of the model")
    parser.add_argument("--limit", type=float, default=6.0, metavar="GB", help="memory that the process may have")
    parser.add_argument("--in-memory", action="store_true", help="no limit, and nothing on the disk: needs 18 GB")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="write the losses here, or compare with it")
    arguments = parser.parse_args()

    overrides = list(arguments.set)
    if arguments.in_memory:
        overrides += [f"offload.{kind}=device" for kind in ("optimizer", "gradients", "parameters")]
    else:
        limit_memory(arguments.limit)
        Path("runs/larger_than_memory").mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    with powertrain.deferred():  # not one of its parameters takes memory here
        model = GPT(SEQUENCE, arguments.width, arguments.depth, arguments.width // 64)
    numel = sum(parameter.numel() for parameter in model.parameters())
    print(f"{numel / 1e9:.2f} billion parameters: {16 * numel / GB:.1f} GB of training state in memory", flush=True)

    start = time.monotonic()
    losses = []
    with powertrain.initialize(model, arguments.config, overrides=overrides) as engine:
        print(f"ready after {time.monotonic() - start:.0f} s, peak {peak():.2f} GB", flush=True)
        for batch in batches(arguments.steps):
            start = time.monotonic()
            losses.append(engine.train_step(batch).item())
            seconds = time.monotonic() - start
            print(f"step {len(losses)}: loss {losses[-1]:.4f}, {seconds:.1f} s, peak {peak():.2f} GB", flush=True)

    if arguments.losses is not None and arguments.losses.exists():
        other = json.loads(arguments.losses.read_text())
        same = losses == other[: len(losses)]
        print(f"the losses {'are bit-equal to' if same else 'differ from'} those in {arguments.losses}")
        if not same:
            return 1
    elif arguments.losses is not None:
        arguments.losses.write_text(json.dumps(losses))
    if not arguments.in_memory and peak() > arguments.limit:
        print(f"peak {peak():.2f} GB is more than the limit of {arguments.limit} GB")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
