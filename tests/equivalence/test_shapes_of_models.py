"""Models that are not a plain stack: unused, frozen, tied and conditional parameters, groups, several losses."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from torch import nn

import powertrain

STEPS = 6


class Odd(nn.Module):
    """Has tied weights, a frozen layer, a layer nobody calls, and two towers chosen by the batch."""

    def __init__(self) -> None:
        super().__init__()
        width = plain.FEATURES
        self.frozen = nn.Linear(width, width)
        self.unused = nn.Linear(width, width)
        self.left = nn.Linear(width, width)
        self.right = nn.Linear(width, width)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied_again = nn.Linear(width, width, bias=False)
        self.tied_again.weight = self.tied.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, tower: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.tied(self.frozen(x)))
        chosen = self.left if int(tower[0]) == 0 else self.right
        return (self.tied_again(chosen(x)) ** 2).mean()


def make_odd() -> Odd:
    torch.manual_seed(5)
    return Odd()


def pieces_of(world: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each rank's batch; with several ranks, odd ranks take the right tower."""
    inputs, _ = plain.make_data()
    size = len(inputs) // world
    return [(inputs[r * size : (r + 1) * size], torch.full((size,), r % 2 if world > 1 else 0)) for r in range(world)]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return three groups: one with decay, one without, one empty."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trainable if p.ndim == 1], "weight_decay": 0.0, "lr": 3e-3},
        {"params": [], "lr": 7.0},
    ]


def train_odd(world: int, bucket_bytes: int) -> dict[str, Any]:
    """Train ``Odd`` with an engine; run on every rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("powertrain.buckets.BUCKET_BYTES", bucket_bytes)
        return train_odd_with_buckets(world)


def train_odd_with_buckets(world: int) -> dict[str, Any]:
    model = make_odd()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-3)
    with powertrain.initialize(model, {"optimizer": {"clip": 1.0}}, optimizer=optimizer) as engine:
        for _ in range(STEPS):
            engine.train_step(pieces_of(world)[engine.data_rank])
        group_count = len(engine.optimizer_wrapper.optimizer.param_groups)
        touched = [n for n, p in model.named_parameters() if optimizer.state.get(p)]
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"params": params, "groups": group_count, "state": sorted(touched)}


def plain_odd(world: int) -> dict[str, torch.Tensor]:
    """The plain loop: the mean of the pieces' losses."""
    model = make_odd()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.stack([model(*batch) for batch in pieces_of(world)]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("bucket_bytes", [64, 25 * 2**20], ids=["many buckets", "one bucket"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_odd_models_train_as_in_plain_torch(ranks: Any, world: int, bucket_bytes: int) -> None:
    """Ties, frozen and unused parameters, branches that differ between ranks and empty groups change nothing."""
    start, theirs = dict(make_odd().named_parameters()), plain_odd(world)
    for mine in ranks(world, train_odd, world, bucket_bytes):
        assert plain.difference(mine["params"], theirs) <= 1e-6
        assert mine["groups"] == 3
        assert torch.equal(mine["params"]["unused.weight"], start["unused.weight"])
        assert torch.equal(mine["params"]["frozen.weight"], start["frozen.weight"])
        right = {"right.weight", "right.bias"} if world > 1 else set()
        assert set(mine["state"]) == {"left.weight", "left.bias", "tied.weight"} | right


def train_two_losses(world: int) -> dict[str, torch.Tensor]:
    """Backpropagate two losses of one forward pass, one after the other."""
    model = plain.make_model()
    with powertrain.initialize(model, {"optimizer": {"lr": 1e-3}}) as engine:
        inputs, targets = plain.piece(plain.make_data(), engine.data_rank, world)
        for _ in range(STEPS):
            logits = engine(inputs)
            nn.functional.cross_entropy(logits, targets).backward(retain_graph=True)
            logits.backward(torch.full_like(logits, 1e-3))
            assert engine.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world", [1, 2])
def test_two_losses_and_a_given_gradient(ranks: Any, world: int) -> None:
    """Several backward passes, one of them from a tensor that is no scalar, add up as in plain torch."""
    model = plain.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = plain.make_data()
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = model(inputs)
        nn.functional.cross_entropy(logits, targets).backward(retain_graph=True)
        logits.backward(torch.full_like(logits, 1e-3 / world))
        optimizer.step()
    theirs = {name: p.detach() for name, p in model.named_parameters()}
    for mine in ranks(world, train_two_losses, world):
        assert plain.difference(mine, theirs) <= 1e-6


def train_divergent_losses(bucket_bytes: int) -> dict[str, torch.Tensor]:
    """Two backward passes of one forward, the first through another layer on each rank."""
    model = make_odd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("powertrain.buckets.BUCKET_BYTES", bucket_bytes)
        engine = powertrain.initialize(model, {"optimizer": {"name": "sgd", "lr": 0.1}})
    with engine:
        for step in range(STEPS):
            inputs, _ = pieces_of(2)[engine.data_rank]
            layers = [model.left, model.right] if (engine.data_rank + step) % 2 else [model.right, model.left]
            engine((inputs, torch.full((len(inputs),), 0)))  # begins the micro-batch
            for layer in layers:
                (layer(model.tied(inputs)) ** 2).mean().backward()
            assert engine.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("bucket_bytes", [64, 25 * 2**20], ids=["many buckets", "one bucket"])
def test_several_backward_passes_that_differ_between_ranks(ranks: Any, bucket_bytes: int) -> None:
    """Gradients that come after their bucket has left are averaged too, whichever bucket that was on which rank."""
    model = make_odd()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for inputs, _ in pieces_of(2):
            for layer in (model.left, model.right):
                ((layer(model.tied(inputs)) ** 2).mean() / 2).backward()
        optimizer.step()
    theirs = {name: p.detach() for name, p in model.named_parameters()}
    results = ranks(2, train_divergent_losses, bucket_bytes)
    for mine in results:
        assert plain.same_bits(mine, results[0])
        assert plain.difference(mine, theirs) <= 1e-6


def train_two_engines() -> list[dict[str, torch.Tensor]]:
    """Train a student on a teacher's outputs, both learning, in one process."""
    teacher, student = plain.make_model(1), plain.make_model(2)
    one = powertrain.initialize(teacher, {"optimizer": {"lr": 1e-3}}, loss_fn=nn.CrossEntropyLoss())
    two = powertrain.initialize(student, {"optimizer": {"name": "sgd", "lr": 0.1}})
    with one, two:
        mine = plain.piece(plain.make_data(), one.data_rank, one.data_size)
        for _ in range(STEPS):
            one.train_step(mine)
            with torch.no_grad():
                wanted = teacher(mine[0])
            nn.functional.mse_loss(two(mine[0]), wanted).backward()
            two.step()
    return [{name: p.detach().clone() for name, p in m.named_parameters()} for m in (teacher, student)]


@pytest.mark.parametrize("world", [1, 2])
def test_two_engines_in_one_process(ranks: Any, world: int) -> None:
    """Two engines interleaved train as two plain loops do; nothing is shared between them."""
    teacher, student = plain.make_model(1), plain.make_model(2)
    first = torch.optim.AdamW(teacher.parameters(), lr=1e-3)
    second = torch.optim.SGD(student.parameters(), lr=0.1)
    inputs, targets = plain.make_data()
    for _ in range(STEPS):
        first.zero_grad()
        nn.functional.cross_entropy(teacher(inputs), targets).backward()
        first.step()
        second.zero_grad()
        nn.functional.mse_loss(student(inputs), teacher(inputs).detach()).backward()
        second.step()
    for mine in ranks(world, train_two_engines):
        for got, model in zip(mine, (teacher, student), strict=True):
            assert plain.difference(got, {n: p.detach() for n, p in model.named_parameters()}) <= 1e-6
