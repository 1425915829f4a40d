"""State that rests elsewhere, against the same run with everything on the device: the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain
import pytest
import sharded
import torch
from torch import nn

import powertrain

STEPS = 4
EVERYTHING = ("optimizer", "gradients", "parameters")


def config(stage: int, **more: Any) -> dict[str, Any]:
    """Return a run of one stage with two micro-batches in a step."""
    zero = {"stage": stage} | ({"bucket": 300} if stage < 3 else {"prefetch": 2})
    return {"zero": zero, "batch": {"accumulation": 2}, "optimizer": {"clip": 0.05}, **more}


def away(stage: int, path: Path, **more: Any) -> dict[str, Any]:
    """Return a table by which everything rests on a disk that may at this stage."""
    return {**dict.fromkeys(EVERYTHING[:stage], "nvme"), "path": str(path), "grain": 4096, **more}


def bits(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return what the ranks hold together, and what the steps told."""
    told = {key: torch.tensor(results[0][key], dtype=torch.float64) for key in ("losses", "norms")}
    return sharded.whole([result["slices"] for result in results]) | told


FORMATS: list[dict[str, Any]] = [
    {},
    {"compute": "bf16"},
    {"compute": "fp16"},
    {"compute": "bf16", "autocast": True},
    {"compute": "bf16", "master": "bf16"},
    {"compute": "bf16", "optimizer": "bf16"},
    {"compute": "bf16", "reduce": "bf16", "accumulate": "fp32"},
]


@pytest.mark.parametrize("precision", FORMATS, ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_tiers_change_no_bit(ranks: Any, tmp_path: Path, world: int, stage: int, precision: dict[str, Any]) -> None:
    """Whatever rests on a disk, at every stage and in every format: losses, norms, parameters and moments."""
    if (
        world == 1 and "reduce" in precision
    ):  # alone, gradients on the device travel once a step, not once a micro-batch
        precision = {"compute": precision["compute"]}
    settings = config(stage, precision=precision)
    near = ranks(world, sharded.train_tower, settings, STEPS, 2 * world)
    far = ranks(world, sharded.train_tower, {**settings, "offload": away(stage, tmp_path)}, STEPS, 2 * world)
    assert plain.same_bits(bits(far), bits(near))
    assert [r["skipped"] for r in far] == [r["skipped"] for r in near]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "places", [("optimizer",), ("gradients",), ("parameters",), ("optimizer", "parameters")], ids=str
)
def test_each_category_alone(ranks: Any, tmp_path: Path, places: tuple[str, ...], world: int) -> None:
    """Each category may rest elsewhere without the others."""
    settings = config(3, precision={"compute": "bf16"})
    near = ranks(world, sharded.train_tower, settings, STEPS, 2 * world)
    table = {**dict.fromkeys(places, "nvme"), "path": str(tmp_path)}
    far = ranks(world, sharded.train_tower, {**settings, "offload": table}, STEPS, 2 * world)
    assert plain.same_bits(bits(far), bits(near))


def test_against_the_plain_loop(ranks: Any, tmp_path: Path) -> None:
    """Not only is it the same as on the device: it is what PyTorch alone does."""
    settings = {**config(3), "offload": away(3, tmp_path)}
    mine, theirs = ranks(2, sharded.train_tower, settings, STEPS, 4), sharded.plain_tower(STEPS, 4, clip=0.05)
    assert plain.difference(sharded.parameters([r["slices"] for r in mine]), theirs["params"]) <= 1e-6
    assert mine[0]["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
    assert mine[0]["norms"] == pytest.approx(theirs["norms"], rel=1e-5)


@pytest.mark.parametrize("engine", ["uring", "direct", "threads"])
def test_every_engine_moves_the_same_bits(ranks: Any, tmp_path: Path, engine: str) -> None:
    """The engines in C++ and the one in Python give one result."""
    settings = config(3)
    near = ranks(2, sharded.train_tower, settings, STEPS, 4)
    far = ranks(2, sharded.train_tower, {**settings, "offload": away(3, tmp_path, engine=engine)}, STEPS, 4)
    assert plain.same_bits(bits(far), bits(near))


@pytest.mark.parametrize("ratio", [0.01, 0.4, 0.75])
def test_a_part_stays_on_the_device(ranks: Any, tmp_path: Path, ratio: float) -> None:
    """By ratio, some chunks rest on the device and some elsewhere (Twin-Flow)."""
    settings = config(2, precision={"compute": "bf16"})
    near = ranks(2, sharded.train_tower, settings, STEPS, 4)
    table = {"optimizer": "nvme", "path": str(tmp_path), "ratio": ratio}
    far = ranks(2, sharded.train_tower, {**settings, "offload": table}, STEPS, 4)
    assert plain.same_bits(bits(far), bits(near))


@pytest.mark.parametrize(
    "zero", [{"shard_group": 1}, {"shard_group": 2}, {"secondary": 2}, {"gather": "int8"}, {"reduce": "int8"}], ids=str
)
def test_groups_and_quantized_wires(ranks: Any, tmp_path: Path, zero: dict[str, Any]) -> None:
    """Replicas, second slices and quantized wires read what rests elsewhere as they read the device."""
    settings = config(3)
    settings["zero"] |= zero
    near = ranks(4, sharded.train_tower, settings, STEPS, 8)
    far = ranks(4, sharded.train_tower, {**settings, "offload": away(3, tmp_path)}, STEPS, 8)
    assert plain.same_bits(bits(far), bits(near))


class Wide(nn.Module):
    """Matrices that are larger than a chunk, of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(plain.FEATURES, 301)
        self.blocks = nn.ModuleList(nn.Linear(301, 301) for _ in range(3))
        self.head = nn.Linear(301, plain.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def train_wide(settings: dict[str, Any], steps: int, directory: str | None = None, load: bool = False) -> Any:
    """Train ``Wide``; save at the end, or load at the start; return what there is of it, by name."""
    torch.manual_seed(3)
    with powertrain.initialize(Wide(), settings, loss_fn=nn.CrossEntropyLoss()) as engine:
        if load:
            engine.load_checkpoint(directory)
        mine = plain.piece(plain.make_data(), engine.data_rank, engine.data_size)
        losses = [float(engine.train_step(mine)) for _ in range(steps)]
        found = {}
        for name, param in engine.module.named_parameters():
            state = powertrain.state(param)
            found[name] = state.value.full()
            found[f"{name}/grad"] = state.grad.full() if state.grad is not None else torch.zeros(0)
            found |= {f"{name}/{key}": state.optimizer[key].full() for key in ("exp_avg", "exp_avg_sq", "step")}
        with powertrain.full(engine.module):
            found |= {f"{name}/whole": p.detach().clone() for name, p in engine.module.named_parameters()}
        if directory is not None and not load:
            engine.save_checkpoint(directory)
        return losses, found


@pytest.mark.parametrize("name", ["adamw", "torch.optim.AdamW", "lion", "adam8bit", "lamb", "muon", "adafactor", "sgd"])
def test_optimizers_by_chunks(ranks: Any, tmp_path: Path, name: str) -> None:
    """Matrices are cut into chunks where the optimizer allows it; values, moments and gradients are the same."""
    settings = {**config(3), "optimizers": {}}
    settings["optimizer"] = {"name": name, "lr": 1e-3, "clip": 0.05}
    settings["zero"]["unit"] = "Linear"
    near = ranks(2, train_tiny, settings, STEPS)
    far = ranks(2, train_tiny, {**settings, "offload": away(3, tmp_path)}, STEPS)
    assert plain.same_bits(bits(far), bits(near))


def train_tiny(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train ``Wide``; return what the steps told, and what this rank holds."""
    torch.manual_seed(3)
    with powertrain.initialize(Wide(), settings, loss_fn=nn.CrossEntropyLoss()) as engine:
        mine = plain.piece(plain.make_data(), engine.data_rank, engine.data_size)
        told = [(float(engine.train_step(mine)), engine.grad_norm) for _ in range(steps)]
        losses, norms = zip(*told, strict=True)
        return {"losses": losses, "norms": norms, "slices": sharded.slices(engine)}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "first,then", [((2, True), (2, False)), ((2, False), (1, True)), ((1, True), (2, True))], ids=str
)
def test_checkpoints_fit_every_tier(
    ranks: Any, tmp_path: Path, first: tuple[int, bool], then: tuple[int, bool], compute: str
) -> None:
    """What was saved from one tier and number of ranks goes on in another, as the run that was never stopped."""
    swap = tmp_path / "swap"
    swap.mkdir()
    directory = str(tmp_path / "saved")

    def settings(world: int, far: bool) -> dict[str, Any]:
        table = {**config(3, precision={"compute": compute}), "batch": {"accumulation": 1, "total": plain.SAMPLES}}
        return {**table, "offload": away(3, swap)} if far else table

    ranks(first[0], train_wide, settings(*first), 2, directory)
    unbroken = ranks(then[0], train_wide, settings(then[0], False), 4)[0]
    resumed = ranks(then[0], train_wide, settings(*then), 2, directory, True)[0]
    assert resumed[0] == pytest.approx(unbroken[0][2:], rel=1e-5 if compute == "fp32" else 2e-2)
    for name, tensor in unbroken[1].items():
        tolerance = 1e-5 if compute == "fp32" else 2e-2
        torch.testing.assert_close(resumed[1][name].float(), tensor.float(), rtol=tolerance, atol=tolerance)


def evaluate_wide(settings: dict[str, Any]) -> dict[str, Any]:
    """Train ``Wide`` by a schedule-free optimizer, with an evaluation of the average between the steps."""
    from powertrain_optimizers.schedule_free import evaluating

    torch.manual_seed(3)
    with powertrain.initialize(Wide(), settings, loss_fn=nn.CrossEntropyLoss()) as engine:
        mine = plain.piece(plain.make_data(), engine.data_rank, engine.data_size)
        losses = []
        for _ in range(3):
            losses.append(float(engine.train_step(mine)))
            with evaluating(engine):
                losses.append(float(engine.eval_step(mine)))
        return {"losses": losses, "norms": [0.0], "slices": sharded.slices(engine)}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_an_optimizer_that_changes_parameters_between_steps(ranks: Any, tmp_path: Path, compute: str) -> None:
    """Schedule-free AdamW evaluates another point than it trains: its state comes for that as for an update."""
    settings = {"zero": {"stage": 3, "unit": "Linear"}, "optimizers": {}, "precision": {"compute": compute}}
    settings["optimizer"] = {"name": "schedule_free_adamw", "lr": 1e-2}
    near = ranks(2, evaluate_wide, settings)
    far = ranks(2, evaluate_wide, {**settings, "offload": away(3, tmp_path)})
    assert plain.same_bits(bits(far), bits(near))


LATE = ("blocks.2.", "head.")
"""What is updated late in ``Wide``: units from the end that make up at most half of the parameters."""


def late_loop(steps: int, clip: float) -> dict[str, Any]:
    """Train ``Wide`` with nothing but PyTorch; the late units are used as they were one update before."""
    torch.manual_seed(3)
    model = Wide()
    masters = {name: nn.Parameter(param.detach().clone()) for name, param in model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-3)
    inputs, targets = plain.make_data()
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        losses.append(loss.item())
        for name, param in model.named_parameters():
            masters[name].grad = param.grad
        nn.utils.clip_grad_norm_(masters.values(), clip)
        before = {name: master.detach().clone() for name, master in masters.items()}
        optimizer.step()
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(before[name] if name.startswith(LATE) else masters[name])
    return {"losses": losses, "params": {name: master.detach().clone() for name, master in masters.items()}}


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_a_delayed_update_is_one_step_late_and_no_more(ranks: Any, tmp_path: Path, world: int, stage: int) -> None:
    """The units at the end use parameters of one update before, as in a loop that does so; masters are never late."""
    settings = {"zero": {"stage": stage} | ({"unit": "Linear"} if stage == 3 else {"bucket": 93_000}), "optimizers": {}}
    settings |= {"batch": {"total": plain.SAMPLES}, "optimizer": {"lr": 1e-3, "clip": 0.05}}
    settings["offload"] = away(stage, tmp_path, delayed=True)
    mine, theirs = ranks(world, train_tiny, settings, 6), late_loop(6, 0.05)
    assert mine[0]["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
    assert plain.difference(sharded.parameters([r["slices"] for r in mine]), theirs["params"]) <= 1e-5
    near = ranks(world, train_tiny, {k: v for k, v in settings.items() if k != "offload"}, 6)
    assert mine[0]["losses"] != pytest.approx(near[0]["losses"], rel=1e-6), "nothing was late"


class Broad(nn.Module):
    """Activations of more than a mebibyte, with little between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(plain.FEATURES, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 12_000), nn.Tanh(), nn.Linear(12_000, 16)) for _ in range(3)
        )
        self.head = nn.Linear(16, plain.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + nn.functional.dropout(block(x), 0.1)
        return self.head(x)


def train_broad(settings: dict[str, Any]) -> dict[str, Any]:
    """Train ``Broad``; tell how many bytes of activations have moved."""
    torch.manual_seed(3)
    with powertrain.initialize(Broad(), settings, loss_fn=nn.CrossEntropyLoss()) as engine:
        mine = plain.piece(plain.make_data(), engine.data_rank, engine.data_size)
        losses = [float(engine.train_step(mine)) for _ in range(3)]
        moved = engine.context.tier("activations").moved()
        told = {"losses": losses, "norms": [0.0], "slices": sharded.slices(engine)}
        return told | {"fetched": moved.fetched, "stored": moved.stored}


@pytest.mark.parametrize("policy", [None, "selective"])
@pytest.mark.parametrize("stage", [1, 3])
def test_activations_rest_on_a_disk(ranks: Any, tmp_path: Path, stage: int, policy: str | None) -> None:
    """What backward needs of forward is written and read back, dropout's masks included."""
    settings: dict[str, Any] = {"zero": {"stage": stage}, "run": {"seed": 5}}
    if policy is not None:
        settings["recompute"] = {"policy": policy, "save": ["matmul"], "blocks": "Sequential"}
    near = ranks(1, train_broad, settings)
    far = ranks(1, train_broad, {**settings, "offload": {"activations": "nvme", "path": str(tmp_path)}})
    assert plain.same_bits(bits(far), bits(near))
    if policy is None:
        assert far[0]["stored"] == far[0]["fetched"] > 3 * 3 * 48 * 12_000 * 4


def look_at_wide(settings: dict[str, Any]) -> dict[str, Any]:
    """Train, read and write single parameters, stream the model, and train on."""
    torch.manual_seed(3)
    with powertrain.initialize(Wide(), settings, loss_fn=nn.CrossEntropyLoss()) as engine:
        mine = plain.piece(plain.make_data(), engine.data_rank, engine.data_size)
        engine.train_step(mine)
        found = {f"streamed/{name}": tensor.clone() for name, tensor in powertrain.stream(engine)}
        states = [powertrain.state(param) for param in engine.module.parameters()]
        found |= {f"grad/{s.name}": s.grad.full() for s in states if s.grad is not None}
        slices = [state.value.local for state in states]  # all at once, and written after others were looked at
        moments = [state.optimizer["exp_avg"].full() for state in states]
        for part in slices:
            part.mul_(0.5)
        states[0].value.publish()
        for state, moment in zip(states, moments, strict=True):
            state.optimizer["exp_avg"].write(moment + 1)
        with powertrain.full(engine.module, write=True), torch.no_grad():
            engine.module.head.bias.add_(1)
        engine.train_step(mine)
        found |= {f"then/{name}": tensor.clone() for name, tensor in powertrain.stream(engine)}
        found |= {f"moment/{s.name}": s.optimizer["exp_avg"].full() for s in states}
        return found


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_single_parameters_are_read_and_written_where_they_rest(ranks: Any, tmp_path: Path, compute: str) -> None:
    """What was read is what rests, and what was written is trained on, whoever else is looked at in between."""
    settings = {"zero": {"stage": 3, "unit": "Linear"}, "precision": {"compute": compute}}
    near = ranks(2, look_at_wide, settings)
    far = ranks(2, look_at_wide, {**settings, "offload": away(3, tmp_path)})
    for one, other in zip(near, far, strict=True):
        assert plain.same_bits(one, other)
