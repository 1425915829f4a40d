"""What the engine adds to a hand-written PyTorch loop: one process, the same model, interleaved steps.

Run: python benchmarks/engine_overhead.py [--steps 16] [--threads 1] [--json]
Bar: at most 1 % of the step time, as the ratio of the medians; beside it the median of the ratios of
neighbouring steps, which a machine that changes its speed every few seconds disturbs less.
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import powertrain


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.attention(self.norm_1(x)).view(batch, length, 3, width // 64, 64)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    """A GPT of a few million parameters; returns its loss."""

    def __init__(self, width: int, depth: int, vocabulary: int = 2048) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())


def engine_step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    config = {"optimizer": {"lr": 1e-4, "clip": 1.0}, "batch": {"accumulation": 2}}
    engine = powertrain.initialize(model, config)
    return lambda: float(engine.train_step(tokens)) and None


def plain_step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        total = 0.0
        for micro in tokens.chunk(2):
            loss = model(micro)
            (loss / 2).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more than one measures the neighbours")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for width, depth, batch, length, turns in ((64, 2, 8, 64, 30), (256, 4, 8, 128, 3), (512, 4, 4, 256, 1)):
        tokens = torch.randint(0, 2048, (batch, length + 1), generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        ours = engine_step(Model(width, depth), tokens)
        torch.manual_seed(0)
        plain = plain_step(Model(width, depth), tokens)
        times: dict[str, list[float]] = {"engine": [], "plain": []}
        for _ in range(3):
            ours(), plain()
        for index in range(arguments.steps * turns):
            pair = [("engine", ours), ("plain", plain)]
            for name, step in pair if index % 2 else reversed(pair):
                began = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows.append(
            {
                "model": f"{depth} x {width}, {batch} x {length} tokens",
                "plain_ms": round(medians["plain"] * 1e3, 3),
                "engine_ms": round(medians["engine"] * 1e3, 3),
                "overhead_us": round((medians["engine"] - medians["plain"]) * 1e6),
                "ratio": round(medians["engine"] / medians["plain"], 4),
                "paired": round(statistics.median(map(operator.truediv, times["engine"], times["plain"])), 4),
            }
        )
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'model':28} {'plain ms':>10} {'engine ms':>10} {'overhead us':>12} {'ratio':>7} {'paired':>7}  bar 1.01")
    for row in rows:
        verdict = "met" if row["ratio"] <= 1.01 else "MISSED"
        print(
            f"{row['model']:28} {row['plain_ms']:10} {row['engine_ms']:10} {row['overhead_us']:12} "
            f"{row['ratio']:7} {row['paired']:7}  {verdict}"
        )


if __name__ == "__main__":
    main()
