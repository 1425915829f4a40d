"""Shard groups, second slices and quantized collectives against the plain PyTorch loop and one another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import plain
import pytest
import sharded
import torch
from torch import nn

import powertrain
from powertrain.errors import ConfigError, ShardingError

STEPS = 4
WORLD = 4


def config(stage: int, accumulation: int = 2, clip: float | None = 0.05, **zero: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"zero": {"stage": stage, **zero}, "batch": {"accumulation": accumulation}}
    return settings | ({"optimizer": {"clip": clip}} if clip else {})


def train(
    ranks: Any, settings: dict[str, Any], steps: int = STEPS, kind: type[torch.optim.Optimizer] = torch.optim.AdamW
) -> list[dict[str, Any]]:
    count = WORLD * settings["batch"]["accumulation"]
    results: list[dict[str, Any]] = ranks(WORLD, sharded.train_tower, settings, steps, count, kind)
    return results


def check(results: list[dict[str, Any]], theirs: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Assert that the ranks together did what the plain loop did, norms included."""
    assert plain.difference(sharded.parameters([r["slices"] for r in results]), theirs["params"]) <= tolerance
    for mine in results:
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=max(tolerance, 1e-6))
        assert mine["norms"] == pytest.approx(theirs["norms"], rel=max(tolerance, 1e-5))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2])
def test_shard_groups_change_nothing(ranks: Any, group: int, stage: int) -> None:
    """Shards within groups and replicas across: the plain loop's parameters, losses and clipped norms."""
    check(train(ranks, config(stage, shard_group=group)), sharded.plain_tower(STEPS, 8, clip=0.05))


@pytest.mark.parametrize(
    "zero",
    [
        {"secondary": 2},
        {"secondary": 1},
        {"reshard_after_forward": 2, "prefetch": 3},
        {"shard_group": 2, "secondary": 1},
        {"secondary": 2, "unit": ["blocks.*", "blocks.*.inner"]},
    ],
    ids=str,
)
def test_second_slices_change_nothing(ranks: Any, zero: dict[str, Any]) -> None:
    """What backward gathers within the group is what forward gathered over all."""
    check(train(ranks, config(3, **zero)), sharded.plain_tower(STEPS, 8, clip=0.05))


class Switch(nn.Module):
    """Blocks of which a micro-batch runs one half; the halves are units."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(plain.FEATURES, plain.FEATURES) for _ in range(6))
        self.head = nn.ModuleList([nn.Linear(plain.FEATURES, plain.CLASSES)])[0]

    def forward(self, x: torch.Tensor, tower: torch.Tensor) -> torch.Tensor:
        for block in list(self.blocks)[int(tower[0]) :: 2]:
            x = x + torch.tanh(block(x))
        return self.head(x)


def train_switch(settings: dict[str, Any] | None, steps: int) -> dict[str, Any]:
    """Train ``Switch``, with an engine or (without settings) with nothing but PyTorch."""
    torch.manual_seed(5)
    model = Switch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if settings is None:
        for _ in range(steps):
            optimizer.zero_grad()
            for x, tower, y in sharded.data(WORLD):
                (nn.functional.cross_entropy(model(x, tower), y) / WORLD).backward()
            optimizer.step()
        return {name: param.detach() for name, param in model.named_parameters()}
    with powertrain.initialize(model, settings, loss_fn=nn.CrossEntropyLoss(), optimizer=optimizer) as engine:
        for _ in range(steps):
            engine.train_step(sharded.data(WORLD)[engine.data_rank])
        return {"slices": sharded.slices(engine)}


def test_units_that_a_rank_skips_are_sliced_as_well(ranks: Any) -> None:
    """Where ranks run different units, all of them gather the same units along the same dimension in backward."""
    settings = {"zero": {"stage": 3, "secondary": 2, "unit": "Linear"}}
    results = ranks(WORLD, train_switch, settings, STEPS)
    found = sharded.parameters([r["slices"] for r in results])
    assert plain.difference(found, train_switch(None, STEPS)) <= 1e-6


QUANTIZED = [
    {"stage": 3, "gather": "int8"},
    {"stage": 3, "gather": "int8", "secondary": 2, "reduce": "int8", "node": 2},
    {"stage": 3, "gather": "int8", "shard_group": 2, "reduce": "int8"},
    {"stage": 2, "reduce": "int8", "node": 2},
    {"stage": 1, "reduce": "int8"},
    {"stage": 3, "reduce": "int4", "node": 2},
]


@pytest.mark.parametrize("zero", QUANTIZED, ids=str)
def test_quantized_runs_stay_near(ranks: Any, zero: dict[str, Any]) -> None:
    """Losses, norms and parameters are the plain loop's but for rounding, with accumulation; all ranks say the same."""
    theirs = sharded.plain_tower(STEPS, 8, kind=torch.optim.SGD)
    results = train(ranks, config(clip=None, **zero), kind=torch.optim.SGD)
    coarse = zero.get("reduce") == "int4"
    for mine in results:
        assert mine["losses"] == results[0]["losses"]
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-2 if coarse else 2e-3)
        assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-1 if coarse else 2e-2)
    found = sharded.parameters([r["slices"] for r in results])
    off, way = (
        float(torch.cat([(mine[name] - other[name]).detach().flatten() for name in found]).norm())
        for mine, other in (
            (found, theirs["params"]),
            (theirs["params"], dict(sharded.make_tower().named_parameters())),
        )
    )
    assert off / way <= (0.25 if coarse else 0.02), "of the way that the parameters have come"
    assert off > 1e-6, "nothing was quantized"


def test_quantized_runs_repeat(ranks: Any) -> None:
    """The same run gives the same bits."""
    settings = config(3, clip=None, gather="int8", secondary=2, reduce="int4", node=2)
    first, second = (sharded.whole([r["slices"] for r in train(ranks, settings)]) for _ in range(2))
    assert plain.same_bits(first, second)


class Boosted(nn.Module):
    """``Tower`` with its loss times a number that comes with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = sharded.make_tower()

    def forward(self, x: torch.Tensor, tower: torch.Tensor, y: torch.Tensor, boost: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.tower(x, tower).float(), y) * boost[0]


def train_boosted(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train in fp16; the gradients of the last rank's second micro-batch leave fp16 in step 1; run on every rank."""
    model = Boosted()
    skipped = []
    with powertrain.initialize(model, settings) as engine:
        mine = sharded.data(8)[engine.data_rank * 2 : engine.data_rank * 2 + 2]
        for step in range(steps):
            boosts = [1.0, 1e9 if step == 1 and engine.data_rank == WORLD - 1 else 1.0]
            engine.train_step(
                iter([(x, tower, y, torch.full((len(x),), b)) for (x, tower, y), b in zip(mine, boosts, strict=True)])
            )
            skipped.append(engine.skipped_steps)
        return {"skipped": skipped, "slices": sharded.slices(engine)}


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, "reduce": "int8"},
        {"stage": 2, "reduce": "int4", "node": 2},
        {"stage": 3, "reduce": "int8", "node": 2, "gather": "int8", "secondary": 2},
    ],
    ids=str,
)
def test_an_overflow_is_seen_through_quantization(ranks: Any, zero: dict[str, Any]) -> None:
    """fp16 gradients that overflow on one rank skip that step, and only that, on all; parameters stay finite."""
    settings = {"zero": zero, "precision": {"compute": "fp16", "loss_scale": 8.0}, "batch": {"accumulation": 2}}
    results = ranks(WORLD, train_boosted, settings, 4)
    assert all(r["skipped"] == [0, 1, 1, 1] for r in results)
    found = sharded.parameters([r["slices"] for r in results])
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_bf16_quantized(ranks: Any) -> None:
    """bf16 compute over quantized parameters and gradients, fp32 masters: near the fp32 run."""
    settings = config(3, clip=None, gather="int8", secondary=2, reduce="int8", node=2)
    results = train(ranks, settings | {"precision": {"compute": "bf16"}})
    assert results[0]["losses"] == pytest.approx(sharded.plain_tower(STEPS, 8)["losses"], rel=1e-2)
    found = sharded.parameters([r["slices"] for r in results])
    assert {tensor.dtype for name, tensor in found.items() if "frozen" not in name} == {torch.float32}


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"zero": {"stage": 3}}),
    (4, {"zero": {"stage": 1, "shard_group": 1}}),
    (4, {"zero": {"stage": 3, "shard_group": 2}}),
    (4, {"zero": {"stage": 3, "secondary": 2}}),
    (4, {"zero": {"stage": 3, "gather": "int8", "reduce": "int4", "node": 2, "secondary": 2}}),
]


def save_or_load(settings: dict[str, Any], directory: str, *, load: bool) -> dict[str, Any]:
    """Train three steps and save after two, or load and train the third; run on every rank."""
    model = sharded.make_tower(99 if load else 7)
    optimizer = torch.optim.AdamW(sharded.groups_of(model), lr=1e-3)
    with powertrain.initialize(model, settings, loss_fn=nn.CrossEntropyLoss(), optimizer=optimizer) as engine:
        batch = sharded.data(WORLD)
        share = WORLD // engine.data_size
        mine = batch[engine.data_rank * share : (engine.data_rank + 1) * share]
        if load:
            engine.load_checkpoint(directory)
        else:
            for _ in range(2):
                engine.train_step(iter(mine))
            engine.save_checkpoint(directory)
        state = sharded.slices(engine)
        engine.train_step(iter(mine))
        return {"state": state, "end": sharded.slices(engine)}


@pytest.mark.parametrize("saved_as", [3, 5])
def test_checkpoints_fit_every_layout(ranks: Any, tmp_path: Path, saved_as: int) -> None:
    """What groups or quantized runs save, every layout loads bit-equal; the same layout goes on to the same bits."""
    runs = [(world, {"batch": {"accumulation": WORLD // world}, **table}) for world, table in LAYOUTS]
    world, settings = runs[saved_as]
    saved = ranks(world, save_or_load, settings, str(tmp_path), load=False)
    state = sharded.whole([r["state"] for r in saved])
    for number, (other_world, other) in enumerate(runs):
        loaded = ranks(other_world, save_or_load, other, str(tmp_path), load=True)
        assert plain.same_bits(sharded.whole([r["state"] for r in loaded]), state)
        if number == saved_as:
            assert plain.same_bits(*(sharded.whole([r["end"] for r in results]) for results in (loaded, saved)))


def refused(settings: dict[str, Any]) -> str:
    """Return what is said to a table that does not fit."""
    try:
        sharded.train_tower(settings, 0, WORLD)
    except (ConfigError, ShardingError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        ({"stage": 3, "shard_group": 3}, "a divisor of 4: 1, 2, 4"),
        ({"stage": 3, "shard_group": 2, "secondary": 4}, "zero.shard_group to 4"),
        ({"stage": 2, "reduce": "int4", "node": 3}, "zero.node"),
        ({"stage": 2, "gather": "int8"}, "gather needs stage = 3"),
    ],
    ids=str,
)
def test_tables_that_do_not_fit_the_ranks(ranks: Any, zero: dict[str, Any], says: str) -> None:
    """Every rank says what would fit."""
    assert all(says in message for message in ranks(WORLD, refused, config(**zero)))


def train_gpt(zero: dict[str, Any] | None, steps: int) -> list[float]:
    """Train the example's model, small, on text that is at hand; return the losses; run on every rank."""
    example = str(Path(__file__).parents[2] / "examples" / "gpt")
    sys.path.insert(0, example)
    try:
        from model import GPT  # type: ignore[import-not-found]
    finally:
        sys.path.remove(example)
        sys.modules.pop("model", None)
    text = torch.frombuffer(bytearray(Path(torch.__file__).with_name("functional.py").read_bytes()), dtype=torch.uint8)
    torch.manual_seed(0)
    settings = {"optimizer": {"lr": 3e-3, "clip": 1.0}, **({"zero": zero} if zero else {})}
    with powertrain.initialize(GPT(32, width=32, depth=2, heads=2), settings) as engine:
        generator = torch.Generator().manual_seed(engine.data_rank)
        losses = []
        for _ in range(steps):
            starts = torch.randint(0, len(text) - 33, (8,), generator=generator)
            windows = torch.stack([text[start : start + 33] for start in starts]).long()
            batch = {"tokens": windows[:, :-1], "targets": windows[:, 1:]}
            losses.append(float(engine.train_step(batch)))
        return losses


def test_the_loss_of_a_gpt_stays_within_one_percent(ranks: Any) -> None:
    """60 steps with everything quantized (int8 parameters, int4 gradients in two hops, second slice): the same loss."""
    everything = {"stage": 3, "gather": "int8", "reduce": "int4", "node": 2, "secondary": 2}
    theirs = ranks(WORLD, train_gpt, {"stage": 3}, 60)[0]
    mine = ranks(WORLD, train_gpt, everything, 60)[0]
    tail, expected = sum(mine[-10:]) / 10, sum(theirs[-10:]) / 10
    assert expected < 0.8 * theirs[0], "it must have learnt something"
    assert tail == pytest.approx(expected, rel=1e-2)
    assert mine != theirs
