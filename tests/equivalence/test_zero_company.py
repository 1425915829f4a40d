"""The modules, calls and loops that sharding must go along with: each equals the plain loop."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import company
import pytest
import sharded
import threads
import torch
from torch import nn

ALL = [1, 2, 3]
PLAIN = list(range(4))


def check_all(
    world: int, batches: Sequence[Sequence[Any]], cases: Sequence[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    """Train a stack with each settings and arguments, and compare with the plain loop without them."""
    theirs = company.plain_loop(company.make_stack, batches)
    runs = [(batches, settings, arguments) for settings, arguments in cases]
    for parts in zip(*threads.run(world, company.train_many, company.make_stack, runs), strict=True):
        company.equal(parts, theirs)


ORDERS: dict[str, list[list[list[int]]]] = {
    "shared": [[[0, 1, 1, 2, 1], [0, 1, 1, 2, 1]]] * 3,
    "not called": [[[0, 2], [0, 2]]] * 3,
    "skipped by one rank": [[[0, 1, 2, 3], [0, 2, 3]], [[0, 3], [0, 1, 2, 3]], [[1, 2], [0, 1, 2, 3]]],
    "skipped from the second step": [[PLAIN, PLAIN], [[0, 1], PLAIN], [PLAIN, [2, 3]], [[], PLAIN]],
    "in other orders": [[[0, 1, 2, 3], [3, 2, 1, 0]], [[2, 0, 1, 3], [0, 1, 2, 3]], [[3, 0, 1, 2], [1, 0, 3, 2]]],
    "shared by one rank": [[[0, 1, 1, 2], [0, 1, 2]], [[0, 1, 2], [0, 1, 1, 1]], [[0, 1, 2, 0], [0, 1, 2, 0]]],
    "nobody's first": [[[1, 2], [1, 3]], [[0, 1], [3]], [[1], [0, 2]]],
    "shared later by one rank": [[PLAIN, PLAIN], [[0, 1, 1, 2, 3], PLAIN], [PLAIN, [0, 1, 2, 3, 0]]],
    "in another order later": [[PLAIN, PLAIN], [[1, 0, 2, 3], PLAIN], [[3, 2, 1, 0], [0, 2, 1, 3]]],
}


@pytest.mark.parametrize("name", ORDERS)
def test_blocks_called_as_the_batch_asks(name: str) -> None:
    """Blocks that are shared, left out, skipped or permuted on one rank only, step by step: no hang, one result."""
    batches = [company.stack_micros(orders) for orders in ORDERS[name]]
    tables: list[dict[str, Any]] = [
        {"stage": 1},
        {"stage": 2},
        {"stage": 3},
        {"stage": 3, "prefetch": 0},
        {"stage": 3, "reshard_after_forward": False},
        {"stage": 3, "unit": ["blocks.*", "blocks.*.mlp"]},
    ]
    check_all(2, batches, [(company.config(table["stage"], zero=table), {}) for table in tables])


@pytest.mark.parametrize("stage", ALL)
def test_a_tower_that_one_rank_enters_later(stage: int) -> None:
    """Blocks that no rank has run before, and that look like no others, run first on one rank in a later step."""
    ways = [[0, 0], [0, 1], [1, 0], [2, 1], [0, 2]]  # of each rank: one tower, the other, or both
    batches = [company.tower_micros(way) for way in ways]
    theirs = company.plain_loop(company.make_towers, batches)
    runs = [(batches, company.config(stage, zero={"unit": "Block", "stage": stage}), {})]
    for parts in zip(*threads.run(2, company.train_many, company.make_towers, runs), strict=True):
        company.equal(parts, theirs)


@pytest.mark.parametrize("zero", [{"secondary": 2}, {"shard_group": 2}], ids=str)
def test_skips_within_groups(zero: dict[str, Any]) -> None:
    """What is kept after forward within groups does not depend on who skipped what."""
    steps = [[[0, 1, 2, 3], [0, 2, 3], [1], [0, 1, 3]], [[2, 3], PLAIN, PLAIN, []], [PLAIN, [0], [3], PLAIN]]
    check_all(4, [company.stack_micros(orders) for orders in steps], [(company.config(3, zero=zero), {})])


CHECKPOINTS = ["plain", "reentrant", "segments", "reentrant segments"]


@pytest.mark.parametrize("stage", ALL)
def test_activation_checkpointing_by_hand(stage: int) -> None:
    """Blocks run again in backward, alone or two in a segment, reentrant or not, skipped or not: one result."""
    steps = [[[0, 1, 1, 2, 3], PLAIN], [PLAIN, [0, 2, 3]], [[1, 2], [0, 1, 2, 1]]]
    batches = [company.stack_micros(orders) for orders in steps]
    check_all(2, batches, [(company.config(stage), {"checkpoint": how}) for how in CHECKPOINTS])


def two_passes(settings: dict[str, Any], batches: list[list[Any]], how: str) -> dict[str, Any]:
    """Run two forward passes before one backward pass; run on every rank."""
    with company.start(company.make_stack, settings, nn.functional.cross_entropy) as engine:
        values = []
        for micros in batches:
            first, second = company.mine(engine, micros)
            one = engine(first)
            if "eval" in how:
                values.append(float(engine.eval_step(second)))
            two = engine(second)
            if how == "one after the other":
                one.backward()
                two.backward()
            elif how == "retain":
                (one + two).backward(retain_graph=True)
                (one + two).backward()
            else:
                (one + two).backward()
            assert engine.step()
        return {"slices": sharded.slices(engine), "values": values}


@pytest.mark.parametrize("how", ["sum", "eval between", "one after the other", "retain"])
@pytest.mark.parametrize(("stage", "zero"), [(1, {}), (2, {}), (3, {}), (3, {"reshard_after_forward": False})], ids=str)
def test_two_passes_before_backward(stage: int, zero: dict[str, Any], how: str) -> None:
    """Two passes that go back together, an evaluation between, a graph gone back through twice; skips differ."""
    orders = [PLAIN, [0, 2, 3], [1, 2], PLAIN]
    batches = [company.stack_micros(orders)] * company.STEPS
    results = threads.run(2, two_passes, company.config(stage, 2, zero=zero), batches, how)
    weight = 2.0 if how == "retain" else 1.0
    theirs = company.plain_loop(company.make_stack, batches, loss_fn=company.Weighted(weight))
    company.equal([result["slices"] for result in results], theirs)
    assert results[0]["values"] == results[1]["values"]


def failing(settings: dict[str, Any], batches: list[list[Any]], places: list[int], how: str) -> sharded.Slices:
    """Go on after forward passes that raised; run on every rank."""
    with company.start(company.make_stack, settings, nn.functional.cross_entropy) as engine:
        model: Any = engine.module
        for number, micros in enumerate(batches):
            (micro,) = company.mine(engine, micros)
            if number != 1:  # in the first pass, and in one whose order is known
                model.raise_at = places[engine.data_rank]
                with pytest.raises(ArithmeticError):
                    engine.train_step(iter([micro])) if how == "train_step" else engine(micro)
                model.raise_at = -1
            if how == "train_step":
                engine.train_step(iter([micro]))
            else:
                engine(micro).backward()
                engine.step()
        return sharded.slices(engine)


@pytest.mark.parametrize("how", ["train_step", "finer"])
@pytest.mark.parametrize("places", [[1, 1], [0, 3]], ids=str)
@pytest.mark.parametrize("stage", ALL)
def test_errors_that_are_caught(stage: int, places: list[int], how: str) -> None:
    """A forward pass that raises on all ranks, at one block or at different ones, may be caught: training goes on."""
    batches = [company.stack_micros([PLAIN, PLAIN])] * company.STEPS
    parts = threads.run(2, failing, company.config(stage), batches, places, how)
    company.equal(parts, company.plain_loop(company.make_stack, batches))


def failing_backward(settings: dict[str, Any], batches: list[list[Any]]) -> sharded.Slices:
    """Go on after backward passes that raised at different places; run on every rank."""
    with company.start(company.make_stack, settings, nn.functional.cross_entropy) as engine:
        model: Any = engine.module

        def refuse(grad: torch.Tensor) -> None:
            raise ArithmeticError("as the test wants it")

        def plant(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            output.register_hook(refuse)

        for micros in batches:
            (micro,) = company.mine(engine, micros)
            handle = model.blocks[1 + engine.data_rank].register_forward_hook(plant)
            with pytest.raises(ArithmeticError):
                engine.train_step(iter([micro]))
            handle.remove()
            engine.train_step(iter([micro]))
        return sharded.slices(engine)


@pytest.mark.parametrize("stage", ALL)
def test_errors_in_backward_that_are_caught(stage: int) -> None:
    """A backward pass that raises on all ranks, at different blocks, can be caught and training goes on."""
    batches = [company.stack_micros([PLAIN, PLAIN])] * company.STEPS
    parts = threads.run(2, failing_backward, company.config(stage), batches)
    company.equal(parts, company.plain_loop(company.make_stack, batches))


def input_gradients(settings: dict[str, Any], batches: list[list[Any]]) -> dict[str, Any]:
    """Train on inputs that want gradients; run on every rank."""
    with company.start(company.make_stack, settings, nn.functional.cross_entropy) as engine:
        grads = []
        for micros in batches:
            ((x, order, y),) = company.mine(engine, micros)
            x = x.clone().requires_grad_()
            engine((x, order, y)).backward()
            engine.step()
            grads.append(x.grad)
        return {"slices": sharded.slices(engine), "grads": grads}


@pytest.mark.parametrize("stage", ALL)
def test_inputs_that_want_gradients(stage: int) -> None:
    """A leaf that is the model's input gets its gradient, and the parameters theirs."""
    batches = [company.stack_micros([PLAIN, [0, 2]])] * company.STEPS
    results = threads.run(2, input_gradients, company.config(stage), batches)
    company.equal([result["slices"] for result in results], company.plain_loop(company.make_stack, batches))
    model = company.make_stack()
    for result, (x, order, y) in zip(results, batches[0], strict=True):
        x = x.clone().requires_grad_()
        nn.functional.cross_entropy(model(x, order), y).backward()
        assert torch.allclose(result["grads"][0], x.grad, rtol=1e-5, atol=1e-8)


def test_a_router_that_sends_ranks_to_different_experts() -> None:
    """Fifty steps on four ranks whose tokens choose different experts: no hang, equal to replicated training.

    Once with the experts inside of the block, once with each a unit of its own.
    """
    micros = company.routed_micros(4)
    model = company.make_routed()
    chosen = {frozenset(model.blocks[0].route(model.first(x)).argmax(-1).tolist()) for x, _ in micros}
    assert len(chosen) > 1, "the ranks must choose differently"
    tables = [{"stage": stage} for stage in (0, 1, 2, 3)] + [{"stage": 3, "unit": ["blocks.*.experts.*"]}]
    # Each step brings a rank other tokens, so that its routes change.
    batches = [[*micros[step % 4 :], *micros[: step % 4]] for step in range(50)]
    cases = [(batches, company.config(table["stage"], zero=table), {}) for table in tables]
    replicated, *rest = zip(*threads.run(4, company.train_many, company.make_routed, cases), strict=True)
    for parts in rest:
        company.equal(parts, sharded.parameters(replicated))


def test_a_router_over_processes(ranks: Any) -> None:
    """The same with four processes over gloo, where a collective that somebody misses would hang."""
    batches = [company.routed_micros(4)] * 10
    cases = [(batches, company.config(stage), {}) for stage in (0, 3)]
    replicated, sharded_ones = zip(*ranks(4, company.train_many, company.make_routed, cases), strict=True)
    company.equal(sharded_ones, sharded.parameters(replicated))


def repeat(settings: dict[str, Any], batches: list[list[Any]], times: int) -> list[str]:
    """Train anew so often with one engine, from the same values each time; run on every rank."""
    results = []
    with company.start(company.make_stack, settings, nn.functional.cross_entropy, count=6, width=64) as engine:
        first = sharded.slices(engine)
        for _ in range(times):
            held = {s.name: s.tensor for s in engine.optimizer_wrapper.tensors()}
            engine.optimizer_wrapper.optimizer.state.clear()
            for name, _, _, value in first:
                held[name].copy_(value)
            engine.optimizer_wrapper.publish()
            for micros in batches:
                engine.train_step(iter(company.mine(engine, micros)))
            parts = sharded.slices(engine)
            digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, _, _, tensor in parts)).hexdigest()
            results.append(digest)
    return results


def test_repetitions_are_bit_equal(ranks: Any) -> None:
    """A hundred and fifty runs of stage 3, two units ahead, give the same bits each time: nothing races."""
    batches = [company.stack_micros([range(6), range(6)], samples=4)] * 3
    arguments = [company.config(3, zero={"prefetch": 2}), batches, 150]
    for results in ranks.run(2, repeat, arguments, timeout=200.0):
        assert len(results) == 150
        assert len(set(results)) == 1
