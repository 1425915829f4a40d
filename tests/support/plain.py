"""A small model, its data, and the plain PyTorch loop that every feature is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

SAMPLES = 48
FEATURES = 12
CLASSES = 5


class Net(nn.Module):
    """Two hidden layers, a norm and a buffer; returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 24)
        self.norm = nn.LayerNorm(24)
        self.second = nn.Linear(24, 24)
        self.head = nn.Linear(24, CLASSES)
        self.register_buffer("temperature", torch.tensor([1.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        x = x + torch.tanh(self.second(x))
        return self.head(x) / self.temperature


def make_model(seed: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net()


def make_data(samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(samples, FEATURES, generator=generator)
    return inputs, torch.randint(0, CLASSES, (samples,), generator=generator)


def piece(batch: tuple[torch.Tensor, torch.Tensor], index: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index-th of ``count`` equal pieces along dimension 0."""
    inputs, targets = batch
    size = len(inputs) // count
    return inputs[index * size : (index + 1) * size], targets[index * size : (index + 1) * size]


def plain_loop(
    steps: int,
    *,
    pieces: int = 1,
    clip: float | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    options: Mapping[str, Any] | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Train ``Net`` on one batch with nothing but PyTorch; gradients accumulate over ``pieces``."""
    model = make_model()
    update = optimizer(model.parameters(), **(options or {"lr": 1e-3}))
    rates = schedule(update) if schedule else None
    batch, losses, norms = make_data(), [], []
    for _ in range(steps):
        update.zero_grad()
        total = 0.0
        for index in range(pieces):
            inputs, targets = piece(batch, index, pieces)
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = nn.functional.cross_entropy(model(inputs), targets)
            (loss / pieces).backward()
            total += loss.item() / pieces
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        update.step()
        if rates is not None:
            rates.step()
        losses.append(total)
        norms.append(float(norm))
    return {"losses": losses, "norms": norms, "params": {n: p.detach().clone() for n, p in model.named_parameters()}}


def difference(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Return the largest relative difference (2-norm) over all parameters."""
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def same_bits(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
