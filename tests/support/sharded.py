"""A model with everything that sharding must not mind, and what its shards add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plain
import torch
from torch import nn

import powertrain

Slices = list[tuple[str, tuple[int, ...], int, torch.Tensor]]


class Block(nn.Module):
    """A residual block with a branch that only some batches take, and a layer that nobody calls."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.left = nn.Linear(width, width)
        self.right = nn.Linear(width, width)
        self.unused = nn.Linear(3, 5)
        self.frozen = nn.Linear(width, width).requires_grad_(False)

    def forward(self, x: torch.Tensor, tower: int) -> torch.Tensor:
        x = x + self.outer(torch.tanh(self.inner(self.norm(self.frozen(x)))))
        return x + torch.tanh((self.right if tower else self.left)(x))


class Tower(nn.Module):
    """Four blocks between layers that share one weight; a buffer; a layer outside that nobody calls."""

    def __init__(self, width: int = plain.FEATURES) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.last = nn.Linear(width, width, bias=False)
        self.last.weight = self.first.weight
        self.head = nn.Linear(width, plain.CLASSES)
        self.never = nn.Linear(7, 3)
        self.register_buffer("temperature", torch.tensor([1.5]))

    def forward(self, x: torch.Tensor, tower: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, int(tower[0]))
        return self.head(self.last(x)) / self.temperature


def make_tower(seed: int = 7) -> Tower:
    torch.manual_seed(seed)
    return Tower()


def data(micro_batches: int, samples: int = plain.SAMPLES) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return the global batch as micro-batches, which take one branch and the other in turn."""
    inputs, targets = plain.make_data(samples)
    size = samples // micro_batches
    pieces = zip(inputs.split(size), targets.split(size), strict=True)
    return [(x, torch.full((len(x),), k % 2), y) for k, (x, y) in enumerate(pieces)]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return three groups: with decay, without, and one that is empty."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.1},
        {"params": [], "lr": 7.0},
        {"params": [p for p in trainable if p.ndim == 1], "weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.95)},
    ]


def plain_tower(
    steps: int, micro_batches: int, *, clip: float | None = None, kind: type[torch.optim.Optimizer] = torch.optim.AdamW
) -> dict[str, Any]:
    """Train ``Tower`` with nothing but PyTorch on the mean loss of all micro-batches."""
    model = make_tower()
    optimizer = make_optimizer(model, kind)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for x, tower, y in data(micro_batches):
            loss = nn.functional.cross_entropy(model(x, tower), y) / micro_batches
            loss.backward()
            total += loss.item()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        optimizer.step()
        losses.append(total)
    return {"losses": losses, "norms": norms, "params": {n: p.detach().clone() for n, p in model.named_parameters()}}


def make_optimizer(model: nn.Module, kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Return an optimizer whose trajectory does not blow rounding up."""
    if kind is torch.optim.AdamW:
        return kind(groups_of(model), lr=1e-3, eps=1e-7)  # type: ignore[call-arg]
    options = {torch.optim.RMSprop: {"lr": 1e-3, "eps": 1e-2}, torch.optim.SGD: {"lr": 0.02, "momentum": 0.9}}
    return kind([p for p in model.parameters() if p.requires_grad], **options.get(kind, {"lr": 0.01}))  # type: ignore[call-overload,no-any-return]


def train_tower(
    config: Mapping[str, Any], steps: int, micro_batches: int, kind: type[torch.optim.Optimizer] = torch.optim.AdamW
) -> dict[str, Any]:
    """Train ``Tower`` with an engine; run on every rank, each with its run of the micro-batches."""
    model = make_tower()
    optimizer = make_optimizer(model, kind)
    losses, norms = [], []
    with powertrain.initialize(model, dict(config), loss_fn=nn.CrossEntropyLoss(), optimizer=optimizer) as engine:
        share = engine.context.batch.accumulation
        mine = data(micro_batches)[engine.data_rank * share : (engine.data_rank + 1) * share]
        for _ in range(steps):
            losses.append(float(engine.train_step(iter(mine))))
            norms.append(engine.grad_norm)
        return {
            "losses": losses,
            "norms": norms,
            "slices": slices(engine),
            "groups": len(optimizer.param_groups),
            "skipped": engine.skipped_steps,
        }


def slices(engine: powertrain.Engine) -> Slices:
    """Return copies of what this rank would save."""
    result = []
    for item in engine.optimizer_wrapper.tensors():
        loan = item.lend()
        result.append((item.name, tuple(item.shape), item.start, loan.wait().clone()))
        loan.release()
    return result


def whole(parts: Sequence[Slices]) -> dict[str, torch.Tensor]:
    """Put the slices of all ranks together; where several hold the same elements, they must hold the same bits."""
    result: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, shape, start, tensor in part:
            flat = result.setdefault(name, torch.zeros(shape, dtype=tensor.dtype)).view(-1)
            filled = seen.setdefault(name, torch.zeros(shape, dtype=torch.bool)).view(-1)
            stop = start + tensor.numel()
            again = filled[start:stop]
            assert torch.equal(flat[start:stop][again], tensor.view(-1)[again]), f"{name} differs between ranks"
            flat[start:stop] = tensor.view(-1)
            filled[start:stop] = True
    missing = [name for name, filled in seen.items() if not bool(filled.all())]
    assert not missing, f"no rank holds all of {missing}"
    return result


def parameters(parts: Sequence[Slices]) -> dict[str, torch.Tensor]:
    """Return the model's part of ``whole``."""
    return {name[6:]: tensor for name, tensor in whole(parts).items() if name.startswith("model/")}
