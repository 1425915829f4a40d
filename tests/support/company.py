"""Models and loops that sharding must go along with, each beside the plain loop of the same global batch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import plain
import sharded
import threads
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import powertrain

WIDTH = 16
STEPS = 3
OPTIONS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-4}
Micro = tuple[Any, ...]
M = TypeVar("M", bound=nn.Module)


class Mixer(nn.Module):
    """The inner part of a block, which may be a unit of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))


class Block(nn.Module):
    """A block that writes into its input first, and uses a weight of its own without a module."""

    def __init__(self, width: int = WIDTH, inplace: bool = True) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=inplace)
        self.norm = nn.LayerNorm(width)
        self.mlp = Mixer(width)
        self.gate = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(x)
        h = self.norm(x)
        return nn.functional.linear(h, self.gate) + self.mlp(h) + x - 0.5


class Stack(nn.Module):
    """Blocks that are called in the order that the batch asks for; -1 stands for none.

    Args:
        count: of blocks.
        checkpoint: how blocks are run again in backward: not at all, "plain", "reentrant", "segments" of two,
            or "reentrant segments".
        width: of the blocks.
        inplace: each block writes into its input.

    Attributes:
        raise_at: the place in the order at which the model raises; -1 for none.
    """

    def __init__(self, count: int = 4, checkpoint: str | None = None, width: int = WIDTH, inplace: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(plain.FEATURES, width)
        self.blocks = nn.ModuleList(Block(width, inplace=inplace and checkpoint is None) for _ in range(count))
        self.idle = nn.Linear(3, 3)
        self.head = nn.Linear(width, plain.CLASSES)
        self.checkpoint = checkpoint
        self.raise_at = -1

    def forward(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        numbers = [int(number) for number in order[0] if number >= 0]
        if self.checkpoint is not None and "segments" in self.checkpoint:
            reentrant = "reentrant" in self.checkpoint
            for start in range(0, len(numbers), 2):
                x = checkpoint(self.run, x, numbers[start : start + 2], use_reentrant=reentrant)
            return self.head(x)
        for place, number in enumerate(numbers):
            if place == self.raise_at:
                raise ArithmeticError("as the test wants it")
            block = self.blocks[number]
            if self.checkpoint is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpoint == "reentrant")
        return self.head(x)

    def run(self, x: torch.Tensor, numbers: list[int]) -> torch.Tensor:
        for number in numbers:
            x = self.blocks[number](x)
        return x


class Router(nn.Module):
    """Each token goes to the one expert that it scores highest; experts without tokens do not run."""

    def __init__(self, width: int = WIDTH, experts: int = 4) -> None:
        super().__init__()
        self.route = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Mixer(width) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.route(x).softmax(-1)
        weight, chosen = scores.max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            if mask.any():
                out = out.masked_scatter(mask[:, None], expert(x[mask]) * weight[mask][:, None])
        return x + out


class Routed(nn.Module):
    """A model of routers; built so that ranks route their halves of the batch to different experts."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(plain.FEATURES, WIDTH)
        self.blocks = nn.ModuleList(Router() for _ in range(count))
        self.head = nn.Linear(WIDTH, plain.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Towers(nn.Module):
    """Two towers of blocks at places that have no name in common; a batch goes through one, the other, or both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(plain.FEATURES, WIDTH)
        self.text = nn.ModuleList(Block(inplace=False) for _ in range(2))
        self.image = nn.ModuleDict({"encoder": nn.Sequential(*(Block(inplace=False) for _ in range(3)))})
        self.head = nn.Linear(WIDTH, plain.CLASSES)

    def forward(self, x: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if int(way[0]) != 1:
            for block in self.text:
                x = block(x)
        if int(way[0]) != 0:
            x = self.image["encoder"](x)
        return self.head(x)


def make_towers() -> Towers:
    torch.manual_seed(11)
    return shaken(Towers())


def tower_micros(ways: Sequence[int], samples: int = 4) -> list[Micro]:
    """Return one micro-batch for each way: 0 and 1 through one tower, 2 through both."""
    inputs, targets = plain.make_data(samples * len(ways))
    rows = [torch.full((samples,), way) for way in ways]
    return list(zip(inputs.split(samples), rows, targets.split(samples), strict=True))


def make_stack(**kwargs: Any) -> Stack:
    torch.manual_seed(5)
    return shaken(Stack(**kwargs))


def shaken(model: M) -> M:
    """Move each parameter a little: those that start at zero would be all rounding after a few steps."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return model


def make_routed(**kwargs: Any) -> Routed:
    torch.manual_seed(6)
    return shaken(Routed(**kwargs))


def routed_micros(world: int, samples: int = 2) -> list[Micro]:
    """Return few samples a rank, so that each rank leaves experts out, other ones than its neighbour."""
    inputs, targets = plain.make_data(samples * world)
    return list(zip(inputs.split(samples), targets.split(samples), strict=True))


def stack_micros(orders: Sequence[Sequence[int]], samples: int = 4) -> list[Micro]:
    """Return one micro-batch for each order of blocks."""
    inputs, targets = plain.make_data(samples * len(orders))
    longest = max(map(len, orders))
    rows = [torch.tensor([[*order, *[-1] * (longest - len(order))]] * samples) for order in orders]
    return list(zip(inputs.split(samples), rows, targets.split(samples), strict=True))


def loss_of(model: nn.Module, micro: Micro, loss_fn: Callable[..., Any] | None) -> torch.Tensor:
    if isinstance(micro, Mapping):
        return model(**micro).loss
    assert loss_fn is not None
    return loss_fn(model(*micro[:-1]), micro[-1])


def plain_loop(
    make: Callable[..., nn.Module],
    batches: Sequence[Sequence[Any]],
    loss_fn: Callable[..., Any] | None = nn.functional.cross_entropy,
    **kwargs: Any,
) -> dict[str, torch.Tensor]:
    """Train on the mean loss of each global batch, given as micro-batches; return the parameters."""
    model = make(**kwargs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **OPTIONS)
    for micros in batches:
        optimizer.zero_grad()
        for micro in micros:
            (loss_of(model, micro, loss_fn) / len(micros)).backward()
        optimizer.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def config(stage: int, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    """Return a run of one stage; 0 stands for the replicated optimizer."""
    zero = {"stage": stage, "bucket": 300, **more.pop("zero", {})}
    if stage == 3:
        zero.setdefault("prefetch", 2)
    tables = {"batch": {"accumulation": accumulation}, "optimizer": OPTIONS, **more}
    return tables | {"zero": zero} if stage else tables


def start(
    make: Callable[..., nn.Module],
    settings: Mapping[str, Any],
    loss_fn: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> powertrain.Engine:
    """Make a model and its engine, in a process or a thread."""
    with threads.BUILDING:
        model = make(**kwargs)
    return powertrain.initialize(model, dict(settings), loss_fn=loss_fn, plugins=threads.plugins())


def mine(engine: powertrain.Engine, micros: Sequence[Any]) -> list[Any]:
    """Return this rank's run of the micro-batches of a global batch."""
    share = len(micros) // engine.data_size
    return list(micros[engine.data_rank * share : (engine.data_rank + 1) * share])


def train(
    make: Callable[..., nn.Module],
    batches: Sequence[Sequence[Any]],
    settings: Mapping[str, Any],
    loss_fn: Callable[..., Any] | None = nn.functional.cross_entropy,
    **kwargs: Any,
) -> sharded.Slices:
    """Train with an engine through ``train_step``; return this rank's slices."""
    with start(make, settings, loss_fn, **kwargs) as engine:
        for micros in batches:
            engine.train_step(iter(mine(engine, micros)))
        return sharded.slices(engine)


def equal(parts: Sequence[sharded.Slices], theirs: Mapping[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Assert that the ranks' slices add up to the plain loop's parameters."""
    found = sharded.parameters(parts)
    # Where parameters share a weight the engine and the plain loop know it by one name.
    differences = {name: float((found[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs}
    assert found.keys() == theirs.keys()
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] <= tolerance, f"{worst} differs by {differences[worst]:g}"


def live_bytes() -> int:
    """Return the bytes of all storages that a Python object still reaches."""
    gc.collect()
    storages: dict[int, int] = {}
    for value in gc.get_objects():
        # Asked for its very type: a freed parameter has no memory, and deprecated objects warn of a longer look.
        if type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Weighted:
    """Cross entropy times a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.factor * nn.functional.cross_entropy(output, target)


def train_many(
    make: Callable[..., nn.Module],
    cases: Sequence[tuple[Sequence[Sequence[Any]], Mapping[str, Any], Mapping[str, Any]]],
    loss_fn: Callable[..., Any] | None = nn.functional.cross_entropy,
) -> list[sharded.Slices]:
    """Train one engine after the other: batches, settings and what the model is made with, each.

    Processes that start and connect cost more than tiny models.
    """
    return [train(make, batches, settings, loss_fn, **kwargs) for batches, settings, kwargs in cases]


class Forces(nn.Module):
    """An energy of blocks, and its negative gradient by the input.

    Args:
        inside: the gradient is taken within forward; otherwise the loss takes it.
    """

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.first = nn.Linear(plain.FEATURES, WIDTH)
        self.blocks = nn.ModuleList(Mixer(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)
        self.inside = inside

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        energy = self.head(torch.tanh(h)).sum(-1)
        if not self.inside:
            return energy, x
        (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy + self.head.bias.sum(), gradient

    @staticmethod
    def loss_of(output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        energy, second = output
        if second.is_leaf:
            (second,) = torch.autograd.grad(energy.sum(), second, create_graph=True)
        return nn.functional.mse_loss(energy, target.float()) + second.square().mean()


def make_forces(**kwargs: Any) -> Forces:
    torch.manual_seed(9)
    return shaken(Forces(**kwargs))
