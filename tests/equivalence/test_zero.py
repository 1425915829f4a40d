"""Sharded training against the plain PyTorch loop: every stage, one mathematics."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import sharded
import torch

STEPS = 5


def config(stage: int, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    """Return a run of one stage; small buckets and deep prefetching make its collectives interleave."""
    zero = {"stage": stage, "bucket": 300, **more.pop("zero", {})}
    if stage == 3:
        zero.setdefault("prefetch", 2)
    return {"zero": zero, "batch": {"accumulation": accumulation}, **more}


def check(results: list[dict[str, Any]], theirs: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Assert that the ranks together did what the plain loop did."""
    assert plain.difference(sharded.parameters([r["slices"] for r in results]), theirs["params"]) <= tolerance
    for mine in results:
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=max(tolerance, 1e-6))
        assert mine["norms"] == pytest.approx(theirs["norms"], rel=max(tolerance, 1e-5))
        assert mine["groups"] == 3 or theirs.get("groups") == 1


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_change_nothing(ranks: Any, stage: int, world: int, accumulation: int, clip: float | None) -> None:
    """Frozen, tied and unused parameters, groups, an empty group, branches that differ between ranks: one result."""
    count = world * accumulation
    settings = config(stage, accumulation, optimizer={"clip": clip} if clip else {})
    check(ranks(world, sharded.train_tower, settings, STEPS, count), sharded.plain_tower(STEPS, count, clip=clip))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
@pytest.mark.parametrize("stage", [1, 3])
def test_other_optimizers(ranks: Any, stage: int, kind: type[torch.optim.Optimizer]) -> None:
    """Every optimizer that updates element by element gives the plain loop's result."""
    theirs = sharded.plain_tower(STEPS, 4, kind=kind) | {"groups": 1}
    check(ranks(2, sharded.train_tower, config(stage, 2), STEPS, 4, kind), theirs)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_that_needs_whole_matrices_gets_them(ranks: Any, stage: int) -> None:
    """A matrix that an update must see whole lies in one rank's slice; the result is the plain loop's."""
    kind = torch.optim.Adafactor
    theirs = sharded.plain_tower(STEPS, 4, kind=kind) | {"groups": 1}
    check(ranks(2, sharded.train_tower, config(stage, 2), STEPS, 4, kind), theirs)


UNITS: list[Any] = [
    None,
    "Block",
    "Linear",
    ["blocks.*"],
    ["blocks.*", "blocks.*.inner"],
    ["first", "blocks.*", "head"],
    400,
    2000,
]


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_any_units(ranks: Any, unit: Any) -> None:
    """However the model is cut into units, nested ones included, the result is the same."""
    settings = config(3, 2, zero={"unit": unit} if unit is not None else {})
    check(ranks(2, sharded.train_tower, settings, STEPS, 4), sharded.plain_tower(STEPS, 4))


@pytest.mark.parametrize(
    "zero",
    [
        {"prefetch": 0},
        {"prefetch": 10},
        {"reshard_after_forward": False},
        {"reshard_after_forward": 2},
        {"secondary": 2},
    ],
    ids=str,
)
def test_when_units_are_gathered(ranks: Any, zero: dict[str, Any]) -> None:
    """Prefetching and what is kept after forward change when bytes travel, and nothing else."""
    world = 4 if "secondary" in zero or zero.get("reshard_after_forward") == 2 else 2
    settings = config(3, 1, zero=zero)
    check(ranks(world, sharded.train_tower, settings, STEPS, world), sharded.plain_tower(STEPS, world))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_same_bits_at_every_bucket_and_unit(ranks: Any, stage: int) -> None:
    """Where the order of reduction is equal, bits are equal: how buffers are cut does not show."""
    runs = [{"bucket": 300, "unit": 400}, {"bucket": 10_000, "unit": "Block"}]
    first, second = (
        sharded.whole([r["slices"] for r in ranks(2, sharded.train_tower, config(stage, 2, zero=z), STEPS, 4)])
        for z in runs
    )
    assert plain.same_bits(first, second)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_low_precision_is_that_of_replicated_training(ranks: Any, compute: str, stage: int) -> None:
    """bf16 and fp16 compute with fp32 masters: to that precision what replicated training does."""
    more = {"precision": {"compute": compute}}
    mine = ranks(2, sharded.train_tower, config(stage, 2, **more), STEPS, 4)
    theirs = ranks(2, sharded.train_tower, {"batch": {"accumulation": 2}, **more}, STEPS, 4)
    assert [r["skipped"] for r in mine] == [r["skipped"] for r in theirs]
    found, expected = (sharded.parameters([r["slices"] for r in results]) for results in (mine, theirs))
    assert all(tensor.dtype == torch.float32 for name, tensor in found.items() if "frozen" not in name)
    assert plain.difference(found, expected) <= 1e-4


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "precision",
    [
        {"compute": "bf16", "master": "bf16"},
        {"compute": "bf16", "optimizer": "bf16"},
        {"compute": "bf16", "reduce": "bf16", "accumulate": "fp32"},
        {"compute": "fp32", "accumulate": "bf16"},
        {"compute": "bf16", "autocast": True},
    ],
    ids=str,
)
def test_recipes(ranks: Any, precision: dict[str, Any], stage: int) -> None:
    """Other masters, optimizer state, reduction and accumulation formats train, near the fp32 result."""
    results = ranks(2, sharded.train_tower, config(stage, 2, precision=precision), STEPS, 4)
    found = sharded.whole([r["slices"] for r in results])
    moments = {tensor.dtype for name, tensor in found.items() if name.endswith("/exp_avg")}
    low = "bf16" in (precision.get("master"), precision.get("optimizer"))
    assert moments == {torch.bfloat16 if low else torch.float32}
    theirs = sharded.plain_tower(STEPS, 4)
    names = [name for name in theirs["params"] if "frozen" not in name]
    mine = {name: found[f"model/{name}"].float() for name in names}
    assert plain.difference(mine, {name: theirs["params"][name] for name in names}) <= 3e-2
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=2e-2)
