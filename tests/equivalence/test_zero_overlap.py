"""Reductions start while backward runs, also where some parameters are never used."""

from __future__ import annotations

from typing import Any

import company
import pytest
import threads
from torch import nn


def sent_before_the_last_gradient(stage: int, orders: list[range]) -> list[int]:
    """Count the reductions that started before the first layer's gradient, in a step for each order of blocks."""
    with company.start(company.make_stack, company.config(stage), nn.functional.cross_entropy) as engine:
        communicator: Any = engine.context.communicator
        started = 0
        plainly = communicator.reduce_scatter

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal started
            started += 1
            return plainly(*args, **kwargs)

        communicator.reduce_scatter = counted
        counts: list[int] = []

        def arrived(param: Any) -> None:
            counts.append(started)

        model: Any = engine.module
        model.first.weight.register_post_accumulate_grad_hook(arrived)
        for order in orders:
            started = 0
            engine.train_step(iter(company.mine(engine, company.stack_micros([order] * 2))))
        assert started > 4, "there is more to send than is counted"
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
