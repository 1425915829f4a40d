"""What sharding goes along with one by one, it goes along with in every pair."""

from __future__ import annotations

import itertools
from typing import Any

import company
import hugging
import pytest
import sharded
import torch
import tqdm
from torch import nn

import powertrain

AXES: dict[str, list[Any]] = {
    "stage": [1, 2, 3],
    "accumulation": [1, 2],
    "compute": ["fp32", "bf16", "fp16"],
    "clip": [None, 0.05],
    "lora": [False, True],
    "checkpoint": [None, "plain", "reentrant"],
    "compiled": [False, True],
}
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 4e-3}
"""Against replicated training of the same precision: each micro-batch is rounded alike, their sums are not.

In fp32 the plain loop is held to the same.
"""


def pairs(row: dict[str, Any]) -> set[tuple[tuple[str, Any], ...]]:
    """Return every two values that a row brings together."""
    return set(itertools.combinations(row.items(), 2))


def covering() -> list[dict[str, Any]]:
    """Return rows such that any two values of two axes meet in one of them; greedy, the same every time."""
    rows = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        row = max(rows, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(row)
        chosen.append(row)
    return chosen


def make(row: dict[str, Any]) -> nn.Module:
    model: Any = hugging.make("gpt2", checkpoint=row["checkpoint"], lora=row["lora"])
    if row["compiled"]:
        inner = model.base_model.model if row["lora"] else model
        for block in inner.transformer.h:
            block.compile(backend="aot_eager")
    return model


def train(rows: list[dict[str, Any]], stages: list[int], batches: list[list[Any]]) -> list[tuple[Any, int]]:
    """Train each row at its stage, one engine after the other; run on every rank."""
    tqdm.tqdm.monitor_interval = 0  # the compiler shows progress with it: no thread is to stay behind
    results = []
    for row, stage in zip(rows, stages, strict=True):
        more = {"precision": {"compute": row["compute"]}, "optimizer": {**company.OPTIONS, "clip": row["clip"]}}
        if row["clip"] is None:
            del more["optimizer"]["clip"]
        settings = company.config(stage, row["accumulation"], **more)
        with powertrain.initialize(make(row), settings) as engine:
            for micros in batches:
                share = row["accumulation"]
                mine = micros[engine.data_rank * share : (engine.data_rank + 1) * share]
                engine.train_step(iter(mine))
            results.append((sharded.slices(engine), engine.skipped_steps))
    return results


def by_hand(row: dict[str, Any], batches: list[list[Any]], world: int) -> dict[str, torch.Tensor]:
    """Train a row's model with nothing but PyTorch on what all ranks see."""
    model = make({**row, "compiled": False}).train()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], **company.OPTIONS)
    for micros in batches:
        seen = micros[: world * row["accumulation"]]
        optimizer.zero_grad()
        for micro in seen:
            (company.loss_of(model, micro, None) / len(seen)).backward()
        if row["clip"] is not None:
            nn.utils.clip_grad_norm_(model.parameters(), row["clip"])
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("world", [2, 4])
def test_every_pair_of_features(ranks: Any, world: int) -> None:
    """Stage, accumulation, precision, clipping, adapters, recomputation and compiled blocks, two by two."""
    rows = covering()
    assert len(rows) >= 9
    batches = [hugging.micros(2 * world)] * 3
    sharded_runs = ranks.run(world, train, [rows, [row["stage"] for row in rows], batches], timeout=250.0)
    plainly = [{**row, "compiled": False} for row in rows]
    replicated = ranks.run(world, train, [plainly, [0] * len(rows), batches], timeout=250.0)
    for row, ours, theirs in zip(rows, zip(*sharded_runs, strict=True), zip(*replicated, strict=True), strict=True):
        assert {skipped for _, skipped in ours} == {skipped for _, skipped in theirs}, row
        found, expected = (sharded.parameters([slices for slices, _ in run]) for run in (ours, theirs))
        for truth in (expected, *([by_hand(row, batches, world)] if row["compute"] == "fp32" else [])):
            assert found.keys() == truth.keys(), row
            for name, tensor in truth.items():
                difference = float((found[name].float() - tensor.float()).norm() / tensor.float().norm())
                assert difference <= TOLERANCE[row["compute"]], (row, name, difference)
