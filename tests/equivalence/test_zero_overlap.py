"""Reductions start while backward runs, also where some parameters are never used."""

from __future__ import annotations

from typing import Any

import company
import plain
import pytest
import sharded
import threads
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import powertrain


class Sent:
    """Counts the reductions of an engine.

    Attributes:
        count: those that have started since it was last set to zero.
    """

    def __init__(self, engine: powertrain.Engine) -> None:
        self.count = 0
        communicator: Any = engine.context.communicator
        self._plainly = communicator.reduce_scatter
        communicator.reduce_scatter = self._counted

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self._plainly(*args, **kwargs)


def by_hand(model: nn.Module, steps: list[list[Any]], lr: float) -> dict[str, torch.Tensor]:
    """Train with nothing but PyTorch on what each rank sees in each step; return the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for batches in steps:
        optimizer.zero_grad()
        for batch in batches:
            (model(*batch) / len(batches)).backward()
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


def sent_before_the_last_gradient(stage: int, orders: list[range]) -> list[int]:
    """Count the reductions that started before the first layer's gradient, in a step for each order of blocks."""
    with company.start(company.make_stack, company.config(stage), nn.functional.cross_entropy) as engine:
        sent = Sent(engine)
        counts: list[int] = []

        def arrived(param: Any) -> None:
            counts.append(sent.count)

        model: Any = engine.module
        model.first.weight.register_post_accumulate_grad_hook(arrived)
        for order in orders:
            sent.count = 0
            engine.train_step(iter(company.mine(engine, company.stack_micros([order] * 2))))
        assert sent.count > 4, "there is more to send than is counted"
        return counts


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_unused_parameters_hold_nothing_up(stage: int) -> None:
    """Layers that nobody calls, in each block and behind the last one, do not keep reductions waiting for the end."""
    for counts in threads.run(2, sent_before_the_last_gradient, stage, [range(4)] * 3):
        assert len(counts) == 3
        assert all(count >= 4 for count in counts[1:]), counts


def test_a_new_way_is_sent_as_it_goes() -> None:
    """Blocks that are used for the first time in a later step are reduced one by one, not all at its end."""
    for counts in threads.run(2, sent_before_the_last_gradient, 3, [range(0), range(4), range(4)]):
        assert all(count >= 4 for count in counts[1:]), counts


def changing(stage: int, steps: list[list[list[int]]]) -> Any:
    """Use blocks for the first time in a later step; run on every rank."""
    batches = [company.stack_micros(orders) for orders in steps]
    return company.train(company.make_stack, batches, company.config(stage, accumulation=2))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_used_for_the_first_time_later(stage: int) -> None:
    """A block that one rank, in one micro-batch, first uses in a later step is reduced all the same."""
    plainly = [0, 1]
    steps = [[plainly] * 4, [plainly, [0, 1, 2], plainly, plainly], [[3], plainly, plainly, [0, 1, 2]], [plainly] * 4]
    theirs = company.plain_loop(company.make_stack, [company.stack_micros(orders) for orders in steps])
    company.equal(threads.run(2, changing, stage, steps), theirs)


class Layers(nn.Module):
    """Layers registered in another order than they run, each a bucket; a batch names the one that it leaves out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(12))
        for layer in self.layers[3:9]:  # in the bucket of the layer, and nobody uses it
            layer.unused = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
        for number in reversed(range(12)):
            if number != int(without[0]):
                x = x + torch.tanh(self.layers[number](x))
        return x.square().mean()


def layered(rank: int, without: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(rank))
    return x, torch.full((4,), without)


def held_back(stage: int, skipped: list[int]) -> tuple[Any, list[tuple[int, int]]]:
    """For each step, count reductions before the last gradient comes and in all; run on every rank."""
    config = {"zero": {"stage": stage, "bucket": 260}, "optimizer": {"name": "sgd", "lr": 0.5}}
    counts = []
    with company.start(Layers, config) as engine:
        sent = Sent(engine)
        before = 0

        def arrived(param: Any) -> None:
            nonlocal before
            before = sent.count

        model: Any = engine.module
        model.layers[11].weight.register_post_accumulate_grad_hook(arrived)  # it runs first
        for without in skipped:
            sent.count = 0
            engine.train_step(layered(engine.data_rank, without))
            counts.append((before, sent.count))
        return sharded.slices(engine), counts


@pytest.mark.parametrize("stage", [1, 2])
def test_a_layer_without_a_gradient_holds_little_back(stage: int) -> None:
    """The order of the first step is kept; what an unused layer holds back is bounded, and nothing is sent twice."""
    skipped = [-1, -1, 0, 5, -1]
    results = threads.run(2, held_back, stage, skipped)
    for _, counts in results:
        assert [total for _, total in counts[1:]] == [12] * 4, counts
        assert counts[1][0] >= 10
        assert counts[2][0] >= 7, "behind the layer that comes first"
        assert counts[3][0] >= 7
    theirs = by_hand(Layers(), [[layered(rank, without) for rank in range(2)] for without in skipped], lr=0.5)
    assert plain.difference(sharded.parameters([slices for slices, _ in results]), theirs) <= 1e-6


class Segments(nn.Module):
    """Blocks of which activation checkpointing runs four at once again."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def run(first: int, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks[first : first + 4]:
                x = x + block(x)
            return x

        x = x.requires_grad_()  # reentrant checkpointing needs it
        for first in (0, 4, 8):
            x = checkpoint(run, first, x, use_reentrant=self.reentrant)
        return x.square().mean()


def in_segments(reentrant: bool) -> tuple[Any, list[int]]:
    """Count the reductions of each step; run on every rank."""
    config = {"zero": {"stage": 3}, "optimizer": {"name": "sgd", "lr": 0.1}}
    counts = []
    with company.start(Segments, config, reentrant=reentrant) as engine:
        sent = Sent(engine)
        for _ in range(3):
            sent.count = 0
            engine.train_step(layered(engine.data_rank, 0)[:1])
            counts.append(sent.count)
        return sharded.slices(engine), counts


@pytest.mark.parametrize("reentrant", [False, True])
def test_units_that_are_run_again_together_are_reduced_once(reentrant: bool) -> None:
    """From the second step on a segment's units are reduced after its backward, not before it and once more."""
    results = threads.run(2, in_segments, reentrant)
    for _, counts in results:
        assert counts[0] > 12
        assert counts[1:] == [12, 12]
    theirs = by_hand(Segments(reentrant), [[layered(rank, 0)[:1] for rank in range(2)]] * 3, lr=0.1)
    assert plain.difference(sharded.parameters([slices for slices, _ in results]), theirs) <= 1e-6
