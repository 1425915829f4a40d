"""torch.compile, block by block, under sharding."""

from __future__ import annotations

import shutil
from typing import Any

import company
import pytest
import sharded
import torch
import tqdm
from torch import nn

import powertrain

PLAIN = [0, 1, 2]


def make(how: str, backend: Any) -> Any:
    """Return a stack whose blocks are compiled in place, or replaced by compiled ones."""
    model = company.make_stack(count=3, inplace=False)
    options = {"compile_threads": 1} if backend == "inductor" else None  # no thread is to stay behind
    for number, block in enumerate(model.blocks):
        if how == "in place":
            block.compile(backend=backend, options=options)
        else:
            model.blocks[number] = torch.compile(block, backend=backend, options=options)
    return model


def compiled(cases: list[tuple[int, str, str]], batches: list[list[Any]]) -> list[dict[str, Any]]:
    """Train compiled blocks, one engine after the other; run on every rank."""
    tqdm.tqdm.monitor_interval = 0  # the compiler shows progress with it: no thread is to stay behind
    results = []
    for stage, how, backend in cases:
        torch.compiler.reset()
        graphs: list[int] = []

        def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], graphs: list[int] = graphs) -> Any:
            graphs.append(len(graph.graph.nodes))
            return graph.forward

        model = make(how, count if backend == "counted" else backend)
        with powertrain.initialize(model, company.config(stage), loss_fn=nn.functional.cross_entropy) as engine:
            for micros in batches:
                engine.train_step(iter(company.mine(engine, micros)))
            units = [unit.name for unit in getattr(engine.optimizer_wrapper, "units", [])]
            results.append({"slices": sharded.slices(engine), "units": units, "graphs": graphs})
    return results


def check(ranks: Any, cases: list[tuple[int, str, str]]) -> None:
    batches = [company.stack_micros([PLAIN, PLAIN])] * company.STEPS
    theirs = company.plain_loop(company.make_stack, batches, count=3, inplace=False)
    for case, results in zip(
        cases, zip(*ranks.run(2, compiled, [cases, batches], timeout=200.0), strict=True), strict=True
    ):
        stage = case[0]
        found = sharded.parameters([result["slices"] for result in results])
        assert found.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert float((found[name] - tensor).norm() / tensor.norm()) <= 1e-6, (case, name)
        if case[2] == "counted":
            assert all(max(result["graphs"]) > 8 for result in results), "the blocks were not compiled"
        if stage == 3:
            assert [name for name in results[0]["units"] if name.startswith("blocks")] == [f"blocks.{n}" for n in PLAIN]


def test_compiled_blocks(ranks: Any) -> None:
    """block.compile() and torch.compile(block) before initialize: the plain loop's result, from compiled code."""
    cases = [(stage, how, "aot_eager") for how in ("in place", "wrapped") for stage in (1, 3)]
    check(ranks, [*cases, (2, "in place", "counted"), (3, "in place", "counted"), (3, "wrapped", "counted")])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler's own backend needs g++")
def test_blocks_compiled_to_machine_code(ranks: Any) -> None:
    """The same with torch.compile's default backend at stage 3."""
    check(ranks, [(3, "in place", "inductor")])
