"""Every optimizer of the plugin ``optimizers``, replicated and sharded, against the same class in a plain loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import plain
import pytest
import sharded
import torch
from torch import nn

import powertrain
from powertrain_cpu.accelerator import CpuAccelerator

STEPS = 4
MICRO_BATCHES = 4
CLIP = 0.05

SMOOTH: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("adam.Adam", {"lr": 1e-3, "eps": 1e-6}),
    "adamw": ("adam.AdamW", {"lr": 1e-3, "eps": 1e-6}),
    "sgd": ("sgd.SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "adagrad": ("adagrad.Adagrad", {"lr": 0.01, "eps": 1e-4}),
    "lamb": ("lamb.Lamb", {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.1}),
    "adafactor": ("adafactor.Adafactor", {"lr": 0.01}),
    "muon": ("muon.Muon", {"lr": 1e-3, "ns_dtype": "fp32", "adamw_eps": 1e-6}),
    "onebit_adam": ("onebit_adam.OneBitAdam", {"lr": 1e-4, "eps": 1e-4, "freeze_step": 3}),
    "zero_one_adam": (
        "zero_one_adam.ZeroOneAdam",
        {"lr": 1e-4, "eps": 1e-4, "var_freeze_step": 2, "var_update_scaler": 1, "local_step_scaler": 1},
    ),
    "onebit_lamb": ("onebit_lamb.OneBitLamb", {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1, "freeze_step": 2}),
    "schedule_free_adamw": ("schedule_free.ScheduleFreeAdamW", {"lr": 1e-3, "eps": 1e-6, "warmup_steps": 2}),
}
"""Rules in which a difference of rounding stays one: kind to class and options."""

JUMPY: dict[str, tuple[str, dict[str, Any]]] = {
    "lion": ("lion.Lion", {"lr": 1e-4}),
    "adam8bit": ("adam8bit.Adam8bit", {"lr": 1e-4, "eps": 1e-6}),
    "adamw8bit": ("adam8bit.AdamW8bit", {"lr": 1e-4, "eps": 1e-6}),
}
"""Rules that round: to a sign, or to 8 bits. A gradient that differs in its last bit moves an element next to a limit
across it, by a step of its own, and leaves the others where they are."""

EVERY = SMOOTH | JUMPY


def make_tower(seed: int = 7) -> nn.Module:
    """Return the tower, two blocks high."""
    model = sharded.make_tower(seed)
    model.blocks = model.blocks[:2]
    return model


def make(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a model, in two groups with an empty one between them."""
    path, options = EVERY[name]
    module, _, attribute = path.partition(".")
    trainable = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in trainable if param.ndim > 1]},
        {"params": []},
        {"params": [param for param in trainable if param.ndim < 2], "lr": options["lr"] / 2},
    ]
    made: torch.optim.Optimizer = getattr(import_module(f"powertrain_optimizers.{module}"), attribute)(
        groups, **options
    )
    return made


def plain_run(name: str, clip: float = CLIP, accelerator: Any = None) -> dict[str, Any]:
    """Train with nothing but PyTorch and the class, which calls no device's kernels unless it is given one."""
    model = make_tower()
    optimizer = make(name, model)
    optimizer.accelerator = accelerator  # type: ignore[attr-defined]
    norms = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for x, tower, y in sharded.data(MICRO_BATCHES):
            (nn.functional.cross_entropy(model(x, tower), y) / MICRO_BATCHES).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
    names = {param: key for key, param in model.named_parameters()}
    return {
        "norms": norms,
        "params": {key: param.detach().clone() for param, key in names.items()},
        "used": {names[param] for param, state in optimizer.state.items() if state},
    }


def train(
    name: str,
    config: Mapping[str, Any],
    *,
    steps: int = STEPS,
    save: str = "",
    load: str = "",
    more: int = 0,
) -> dict[str, Any]:
    """Train with an engine; run on every rank, each with its run of the micro-batches.

    Args:
        name: of the optimizer.
        config: of the run.
        steps: after which the state is returned.
        save: the directory where it is saved as well.
        load: the directory from which the run starts.
        more: steps that follow; what they lead to is returned as "onward".
    """
    model = make_tower(99 if load else 7)
    optimizer = make(name, model)
    with powertrain.initialize(model, dict(config), loss_fn=nn.CrossEntropyLoss(), optimizer=optimizer) as engine:
        if load:
            engine.load_checkpoint(load)
        share = max(1, MICRO_BATCHES // engine.data_size)
        mine = sharded.data(MICRO_BATCHES)[engine.data_rank * share : (engine.data_rank + 1) * share]
        norms = []
        for _ in range(steps):
            engine.train_step(iter(mine))
            norms.append(engine.grad_norm)
        if save:
            engine.save_checkpoint(save)
        result = {"norms": norms, "slices": sharded.slices(engine), "values": engine.optimizer_wrapper.values()}
        for _ in range(more):
            engine.train_step(iter(mine))
        return result | {"onward": sharded.slices(engine)}


def runs(names: Sequence[str], configs: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, list[dict[str, Any]]]:
    """Train with several optimizers in several ways, one after the other: starting ranks costs more than a run."""
    return {name: [train(name, config, **more) for config in configs] for name in names}


def layout(stage: int, world: int, **more: Any) -> dict[str, Any]:
    """Return a configuration; stage 0 is replicated. Small buckets cut parameters."""
    config: dict[str, Any] = {
        "batch": {"accumulation": max(1, MICRO_BATCHES // world)},
        "optimizer": {"clip": CLIP},
        "checkpoint": {"asynchronous": False},
        **more,
    }
    if stage:
        config["zero"] = {"stage": stage, "bucket": 1000}
    return config


def gathered(results: list[dict[str, Any]], name: str, place: int) -> list[dict[str, Any]]:
    """Return what each rank has of one run."""
    return [result[name][place] for result in results]


def apart(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return how far each element is from where it should be, in units of its parameter's root mean square."""
    assert mine.keys() == theirs.keys()
    return torch.cat(
        [
            ((mine[key] - theirs[key]).abs() / theirs[key].square().mean().sqrt().clamp(min=1e-3)).flatten()
            for key in theirs
        ]
    )


def check(name: str, ranks: list[dict[str, Any]], theirs: dict[str, Any]) -> None:
    """Assert that the ranks together did what the plain loop did."""
    whole = sharded.whole([rank["slices"] for rank in ranks])
    mine = {key.removeprefix("model/"): value for key, value in whole.items() if key.startswith("model/")}
    for rank in ranks:
        assert rank["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    if name in SMOOTH:
        assert plain.difference(mine, theirs["params"]) <= 1e-6
    else:
        found = apart(mine, theirs["params"])
        assert (found > 1e-6).float().mean() <= 0.01, "more than a few elements were at a limit"
        assert found.max() <= 2.5 * STEPS * EVERY[name][1]["lr"] / 1e-3, "further than steps of an element's own"
    used = {key.split("/", 1)[1].rpartition("/")[0] for key in whole if key.startswith("optimizer/")}
    assert used == theirs["used"], "state of a parameter that nobody used, or none of one that somebody did"
    steps = {float(value) for key, value in whole.items() if key.endswith("/step")}
    assert steps <= {float(STEPS)}


HALVES = [sorted(EVERY)[::2], sorted(EVERY)[1::2]]


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("world", [1, 2])
def test_every_optimizer_at_every_stage(ranks: Any, world: int, half: int) -> None:
    """Replicated and at each stage, accumulated and clipped: the parameters of the plain loop."""
    # Alone, all stages are one.
    layouts = [layout(stage, world) for stage in ((0, 3) if world == 1 else (0, 1, 2, 3))]
    results = [runs(HALVES[half], layouts)] if world == 1 else ranks(world, runs, HALVES[half], layouts)
    for name in HALVES[half]:
        theirs = plain_run(name)
        for place in range(len(layouts)):
            check(name, gathered(results, name, place), theirs)


@pytest.mark.parametrize("name", JUMPY)
def test_rules_that_round_are_exact_where_gradients_are(name: str) -> None:
    """On one rank gradients have the plain loop's bits: with the same kernels, parameters have them as well."""
    theirs = plain_run(name, clip=float("inf"), accelerator=CpuAccelerator())["params"]
    for stage in (0, 1):
        settings = layout(stage, 1, optimizer={})
        found = sharded.whole([train(name, settings)["slices"]])
        assert plain.same_bits({key: found[f"model/{key}"] for key in theirs}, theirs)


LOW = ["adamw", "lamb", "muon", "adam8bit"]


def test_masters_and_model_in_two_formats(ranks: Any) -> None:
    """In bf16 with fp32 masters, cast within the update, sharded training does what replicated training does."""
    precision = {"precision": {"compute": "bf16"}}
    layouts = [layout(stage, 2, **precision) for stage in (0, 1, 3)]
    results = ranks(2, runs, LOW, layouts)
    for name in LOW:
        first, *others = (
            sharded.parameters([rank["slices"] for rank in gathered(results, name, place)])
            for place in range(len(layouts))
        )
        assert all(value.dtype == torch.float32 for key, value in first.items() if "frozen" not in key)
        for other in others:
            assert plain.difference(other, first) <= 1e-4


def test_state_in_two_bytes(ranks: Any) -> None:
    """[precision] optimizer = bf16 halves moments, also where nothing is sharded; what must be exact stays so."""
    names = ["adamw", "schedule_free_adamw", "muon"]
    precision = {"precision": {"compute": "bf16", "optimizer": "bf16"}}
    results = ranks(2, runs, names, [layout(stage, 2, **precision) for stage in (0, 2)])
    for name in names:
        theirs = plain_run(name)["params"]
        for place in (0, 1):
            whole = sharded.whole([rank["slices"] for rank in gathered(results, name, place)])
            formats = {key.rpartition("/")[2]: value.dtype for key, value in whole.items() if key[:9] == "optimizer"}
            for key, dtype in formats.items():
                assert dtype == (torch.float32 if key in ("step", "z") else torch.bfloat16), key
            mine = {key: whole[f"model/{key}"].float() for key in theirs}
            assert plain.difference(mine, theirs) <= 3e-2


SAVED = ["lamb", "muon", "adam8bit", "zero_one_adam", "onebit_lamb", "schedule_free_adamw"]


def save_each(directory: str, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Save a run of each optimizer, and go on."""
    return {name: train(name, config, save=f"{directory}/{name}", more=2) for name in SAVED}


def load_each(directory: str, config: Mapping[str, Any], more: int) -> dict[str, dict[str, Any]]:
    """Load each run, and go on."""
    return {name: train(name, config, steps=0, load=f"{directory}/{name}", more=more) for name in SAVED}


def test_every_checkpoint_is_universal(ranks: Any, tmp_path: Path) -> None:
    """Saved by two ranks at stage 3, loaded by three at stage 1 and by one, replicated: the same bits, the same way."""
    saved = ranks(2, save_each, str(tmp_path), layout(3, 2))
    three = ranks(3, load_each, str(tmp_path), layout(1, 3), 0)
    alone = [load_each(str(tmp_path), layout(0, 1), 2)]
    for name in SAVED:
        state = sharded.whole([rank[name]["slices"] for rank in saved])
        assert any(key.startswith("optimizer/") for key in state)
        for loaded in (three, alone):
            assert plain.same_bits(sharded.whole([rank[name]["slices"] for rank in loaded]), state)
            for rank in loaded:
                assert rank[name]["values"] == saved[0][name]["values"]
        onward = [sharded.parameters([rank[name]["onward"] for rank in each]) for each in (alone, saved)]
        if name in SMOOTH:
            assert plain.difference(*onward) <= 1e-6
        else:
            assert (apart(*onward) > 1e-6).float().mean() <= 0.01
