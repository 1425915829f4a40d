"""Sharding where a person does the unusual: refused with words, or as in the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain
import pytest
import sharded
import torch
from torch import nn

import powertrain
from powertrain.errors import EngineError, ParameterFreed, PeerFailed, PrecisionError, ShardingError


class Scaled(nn.Module):
    """Towers without idle parameters, one of which a batch takes, and a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = plain.FEATURES
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.towers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, plain.CLASSES)

    def forward(self, x: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        for tower in [*self.towers[:-1], self.towers[2]] if int(taken[0]) else self.towers[:-1]:
            x = x + torch.tanh(tower(x))
        return self.head(x) * self.scale


def batch(rank: int, world: int, taken: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs, targets = plain.piece(plain.make_data(), rank, world)
    return inputs, torch.full((len(inputs),), taken), targets


def make(config: dict[str, Any], **more: Any) -> powertrain.Engine:
    return powertrain.initialize(Scaled(), config, loss_fn=nn.CrossEntropyLoss(), **more)


def resumed(config: dict[str, Any], directory: str) -> list[Any]:
    """Train, save and train on; then load into another engine and train on the same."""
    results = []
    for load in (False, True):
        with make(config) as engine:
            mine = batch(engine.data_rank, engine.data_size, 1)
            if load:
                engine.load_checkpoint(directory)
            while engine.global_step < 4:
                engine.train_step(mine)
                if engine.global_step == 2 and not load:
                    engine.save_checkpoint(directory)
            results.append(sharded.slices(engine))
    return results


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "bf16", "compute": "bf16"}], ids=["fp32", "bf16 state"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_parameter_without_dimensions_resumes(
    ranks: Any, tmp_path: Path, stage: int, optimizer: dict[str, str]
) -> None:
    """A 0-d parameter's moments are not taken for step counts: the resumed run has the same bits."""
    config = {"zero": {"stage": stage}, "precision": optimizer}
    for first, second in ranks(2, resumed, config, str(tmp_path)):
        assert plain.same_bits({s[0]: s[3] for s in first}, {s[0]: s[3] for s in second})


def dropped(config: dict[str, Any]) -> sharded.Slices:
    """Go backward through another tower on each rank, drop it all, then train."""
    with make(config) as engine:
        rank, world = engine.data_rank, engine.data_size
        engine.backward(engine.loss(batch(rank, world, rank % 2)))
        for _ in range(2):
            engine.train_step(batch(rank, world, rank % 2))  # forgets what the finer calls left
        return sharded.slices(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_dropped_leaves_nobody_waiting(ranks: Any, stage: int) -> None:
    """Ranks that took different branches have sent different reductions when gradients are dropped; all meet again."""
    config = {"zero": {"stage": stage, "bucket": 100}, "optimizer": {"name": "sgd", "lr": 0.1}}
    mine = sharded.parameters(ranks(2, dropped, config))
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            x, taken, y = batch(rank, 2, rank)
            (nn.functional.cross_entropy(model(x, taken), y) / 2).backward()
        optimizer.step()
    assert plain.difference(mine, {n: p.detach() for n, p in model.named_parameters()}) <= 1e-6


def surprises(stage: int) -> list[str]:
    """Do what cannot work after the engine is built; return what is said."""
    said = []
    model = Scaled()
    model.towers[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = powertrain.initialize(
        model, {"zero": {"stage": stage}}, loss_fn=nn.CrossEntropyLoss(), optimizer=optimizer
    )
    mine = batch(engine.data_rank, engine.data_size, 1)
    extra = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [extra]})
    try:
        engine.train_step(mine)
    except ShardingError as error:
        said.append(str(error))
    optimizer.param_groups.pop()
    model.towers[0].requires_grad_(True)
    try:
        engine.train_step(mine)
    except ShardingError as error:
        said.append(str(error))
    model.towers[0].requires_grad_(False)
    engine.train_step(mine)
    engine.close()
    if stage == 3:
        try:
            model.state_dict()
        except ParameterFreed as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("stage", [2, 3])
def test_what_sharding_cannot_follow_is_refused(ranks: Any, stage: int) -> None:
    """Groups added later, parameters unfrozen later and a model whose engine is closed: errors that say so."""
    for said in ranks(2, surprises, stage):
        assert "groups were changed" in said[0]
        assert "towers.0.weight" in said[1]
        assert "requires a gradient now" in said[1]
        assert stage < 3 or "its engine is closed" in said[2]


def test_state_in_another_format_needs_an_update_by_element() -> None:
    """bf16 state of an optimizer that needs whole matrices is refused, not left in fp32 in silence."""
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.Adafactor(model.parameters())
    with pytest.raises(PrecisionError, match="Adafactor"):
        powertrain.initialize(model, {"zero": {"stage": 1}, "precision": {"optimizer": "bf16"}}, optimizer=optimizer)


def shown_gradient(accumulate: str) -> float:
    """Return the norm of the gradients that ``powertrain.state`` shows after a clipped, scaled step."""
    precision = {"compute": "fp32", "accumulate": accumulate, "loss_scale": 1024.0}
    with make({"zero": {"stage": 2}, "precision": precision, "optimizer": {"clip": 1e-3}}) as engine:
        engine.train_step(batch(engine.data_rank, engine.data_size, 1))
        grads = [powertrain.state(p).grad.full() for p in engine.module.parameters()]  # type: ignore[union-attr]
        return float(nn.utils.get_total_norm([grad.float() for grad in grads]))


@pytest.mark.parametrize("accumulate", ["fp32", "bf16"])
def test_gradients_are_shown_unscaled_and_clipped(ranks: Any, accumulate: str) -> None:
    """Also where they add up in another format than the masters."""
    for norm in ranks(2, shown_gradient, accumulate):
        assert norm == pytest.approx(1e-3, rel=2e-2)


def writes_data() -> str:
    with make({"zero": {"stage": 3, "unit": ["towers.*"]}}) as engine:
        engine.train_step(batch(engine.data_rank, engine.data_size, 1))
        weight = engine.module.towers[0].weight  # type: ignore[index,union-attr]
        try:
            weight.data = torch.zeros(weight.shape)
        except ParameterFreed as error:
            return str(error)
    return "nothing"


def test_replacing_a_freed_parameters_memory_is_an_error(ranks: Any) -> None:
    """``param.data = …`` on a freed parameter would be lost at the next gather."""
    for said in ranks(2, writes_data):
        assert "towers.0.weight" in said


class Offsets(nn.Module):
    """Parameters whose gradients autograd hands out as views of one tensor; returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.position = nn.Parameter(torch.randn(16, 16))
        self.time = nn.Parameter(torch.randn(16, 16))
        self.head = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.head(torch.tanh(x + self.position[None] + self.time[None]))).square().mean()


def offset_micros() -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(1, 16, 16, generator=generator),) for _ in range(4)]


def train_offsets(stage: int) -> sharded.Slices:
    config = {"zero": {"stage": stage, "bucket": 16}, "batch": {"micro": 1, "accumulation": 2}}
    optimizer = torch.optim.SGD
    with powertrain.initialize(Offsets(), config, optimizer=lambda params: optimizer(params, lr=1.0)) as engine:
        mine = offset_micros()[2 * engine.data_rank : 2 * engine.data_rank + 2]
        for _ in range(2):
            engine.train_step(iter(mine))
        return sharded.slices(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_that_share_memory(ranks: Any, stage: int) -> None:
    """A gradient is not taken as a buffer where another parameter's is a view of the same memory."""
    mine = sharded.parameters(ranks(2, train_offsets, stage))
    model = Offsets()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    params = list(model.parameters())
    for _ in range(2):
        # Not backward(): twice, it would add the second gradient to both views of the first, as in torch itself.
        grads = [torch.autograd.grad(model(x) / 4, params) for (x,) in offset_micros()]
        for param, *parts in zip(params, *grads, strict=True):
            param.grad = sum(parts)  # type: ignore[assignment]
        optimizer.step()
    assert plain.difference(mine, {n: p.detach() for n, p in model.named_parameters()}) <= 1e-6


class Shared(nn.Module):
    """Blocks around one module that all of them call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        width = plain.FEATURES
        self.scale = nn.Parameter(torch.tensor(1.5))
        inner = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh(), inner) for _ in range(3))
        self.head = nn.Linear(width, plain.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x) * self.scale


def plain_shared(steps: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    inputs, targets = plain.make_data()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


PASTS: dict[str, Any] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}


def train_on(kind: str, stage: int, before: int, after: int) -> sharded.Slices:
    """Train plainly for some steps, then go on under an engine with the same optimizer."""
    model = Shared()
    optimizer = PASTS[kind](model.parameters())
    plain_shared(before, model, optimizer)
    config = {"zero": {"stage": stage}} if stage else {}
    with powertrain.initialize(model, config, loss_fn=nn.functional.cross_entropy, optimizer=optimizer) as engine:
        for _ in range(after):
            engine.train_step(plain.piece(plain.make_data(), engine.data_rank, engine.data_size))
        assert set(optimizer.state) <= {param for group in optimizer.param_groups for param in group["params"]}
        return sharded.slices(engine)


@pytest.mark.parametrize("kind", PASTS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_optimizer_with_a_past_goes_on(ranks: Any, stage: int, kind: str) -> None:
    """Moments that were there before ``initialize`` are sharded and used, a 0-d parameter's as well.

    The blocks share a module.
    """
    mine = sharded.parameters(ranks(2, train_on, kind, stage, 3, 3))
    model = Shared()
    theirs = plain_shared(6, model, PASTS[kind](model.parameters()))
    assert plain.difference(mine, theirs) <= 1e-5


@pytest.mark.parametrize("stage", [1, 3])
def test_a_failed_initialize_leaves_a_model_as_it_was(stage: int) -> None:
    """What it put on the model is off again: the next one, as in a notebook, trains as the first would have."""
    models = Shared(), Shared()

    def refuse(optimizer: torch.optim.Optimizer) -> Any:
        raise ZeroDivisionError

    config = {"zero": {"stage": stage}}
    with pytest.raises(ZeroDivisionError):
        powertrain.initialize(models[0], config, loss_fn=nn.functional.cross_entropy, scheduler=refuse)
    for model in models:
        with powertrain.initialize(model, config, loss_fn=nn.functional.cross_entropy) as engine:
            for _ in range(2):
                engine.train_step(plain.make_data())
    assert plain.same_bits(*(dict(model.named_parameters()) for model in models))


def twice(stage: int) -> str:
    """Build an engine on the model of another; return what is said."""
    model = Shared()
    config = {"zero": {"stage": stage}}
    with powertrain.initialize(model, config, loss_fn=nn.functional.cross_entropy) as engine:
        with pytest.raises(EngineError, match="holds this model already") as caught:
            powertrain.initialize(model, config, loss_fn=nn.functional.cross_entropy)
        engine.train_step(plain.piece(plain.make_data(), engine.data_rank, engine.data_size))
    return str(caught.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_of_an_open_engine_is_refused(ranks: Any, stage: int) -> None:
    """The error names a parameter; the engine that has the model goes on."""
    for said in ranks(2, twice, stage):
        assert "at: scale" in said


class Looking(nn.Module):
    """A layer that asks for its own weight while it runs, in forward and in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(plain.FEATURES) + 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with powertrain.full(self.weight):
            norm = self.weight.norm()
        result = nn.functional.linear(x, self.weight / norm)
        if result.requires_grad:
            result.register_hook(lambda grad: self.look())
        return torch.tanh(result)

    def look(self) -> None:
        with powertrain.full(self.weight):
            assert float(self.weight.detach().norm()) > 0


def look(stage: int) -> sharded.Slices:
    model = nn.Sequential(*(Looking() for _ in range(3)), nn.Linear(plain.FEATURES, plain.CLASSES))
    torch.nn.init.ones_(model[3].weight)
    torch.nn.init.zeros_(model[3].bias)
    heard = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: heard.append(1))
    config = {"zero": {"stage": stage, "bucket": 20}}
    with powertrain.initialize(model, config, loss_fn=nn.functional.cross_entropy, optimizer=optimizer) as engine:
        for step in range(2):
            for _ in range(3):  # with gradients, and nobody goes back
                engine.module(plain.make_data()[0])
            engine.train_step(plain.piece(plain.make_data(), engine.data_rank, engine.data_size))
            assert len(heard) == step + 1
        return sharded.slices(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_model_may_look_at_itself(ranks: Any, stage: int) -> None:
    """A ``full`` block in a pass leaves what the pass uses; hooks of the optimizer hear of one update a step."""
    mine = sharded.parameters(ranks(2, look, stage))
    single = sharded.parameters(ranks(1, look, stage))
    assert plain.difference(mine, single) <= 1e-6


def lost() -> list[str]:
    """Lose a rank in a writing block; return the labels of what travelled at its end."""
    with powertrain.initialize(Shared(), {"zero": {"stage": 3}}, loss_fn=nn.functional.cross_entropy) as engine:
        labels: list[str] = []
        communicator = engine.context.communicator
        broadcast = communicator.broadcast

        def told(tensor: torch.Tensor, source: int, *args: Any, label: str, **more: Any) -> Any:
            labels.append(label)
            return broadcast(tensor, source, *args, label=label, **more)

        communicator.broadcast = told  # type: ignore[method-assign]
        for kind in (PeerFailed, KeyboardInterrupt):
            with pytest.raises(kind), powertrain.full(engine, write=True):
                raise kind("rank 1 is gone")
            with pytest.raises(ParameterFreed):
                engine.module.head.weight.sum()
        assert not labels
        with powertrain.full(engine, write=True):
            pass
        return labels


def test_a_writing_block_does_not_wait_for_a_lost_rank(ranks: Any) -> None:
    """When communication has failed, or a person interrupts, the block's end only frees."""
    for labels in ranks(2, lost):
        assert labels


def norm_of_narrow_gradients(listened: bool) -> tuple[float | None, int]:
    """Reduce gradients of 2000 each in fp16, whose norm is 128,000; return what is told of it, and the steps."""
    model = nn.Linear(64, 64, bias=False)
    config = {
        "zero": {"stage": 1},
        "precision": {"reduce": "fp16"},
        "optimizers": {},
        "optimizer": {"name": "adamw", "lr": 1e-3},
    }
    with powertrain.initialize(model, config, loss_fn=lambda out, _: (out * 2000).sum()) as engine:
        if listened:
            engine.optimizer_wrapper.optimizer.register_step_post_hook(lambda *_: None)
        engine.train_step((torch.ones(1, 64), torch.zeros(1)))
        return engine.grad_norm, engine.global_step - engine.skipped_steps


@pytest.mark.parametrize("listened", [False, True])
def test_the_norm_of_narrow_gradients_is_wide(ranks: Any, listened: bool) -> None:
    """Gradients that fit 16 bits have a norm that does not, and the step is applied."""
    for norm, steps in ranks(2, norm_of_narrow_gradients, listened):
        assert norm == pytest.approx(128_000.0, rel=1e-3)
        assert steps == 1


def listened(reduce: str, clip: float | None, hook: bool) -> torch.Tensor:
    """Train on tiny gradients that travel in 16 bits, with somebody who looks at them or nobody; return parameters."""
    model = plain.make_model(3)
    optimizer = {"name": "adamw", "lr": 1e-3} | ({"clip": clip} if clip is not None else {})
    config = {
        "zero": {"stage": 1},
        "precision": {"compute": reduce, "reduce": reduce},
        "optimizers": {},
        "optimizer": optimizer,
    }
    with powertrain.initialize(
        model, config, loss_fn=lambda out, target: nn.functional.cross_entropy(out.float(), target) * 1e-5
    ) as engine:
        if hook:
            engine.optimizer_wrapper.optimizer.register_step_pre_hook(lambda *_: None)
        mine = plain.piece(plain.make_data(), engine.data_rank, engine.data_size)
        for _ in range(4):
            engine.train_step(mine)
        with powertrain.full(engine.module):
            return torch.cat([param.detach().float().flatten() for param in engine.module.parameters()])


@pytest.mark.parametrize(("reduce", "clip"), [("fp16", None), ("bf16", 1e-6)])
def test_who_listens_changes_nothing(ranks: Any, reduce: str, clip: float | None) -> None:
    """A step hook shows the gradients wider and scaled; the update goes by these, not by what 16 bits keep of them."""
    for without, with_hook in zip(*(ranks(2, listened, reduce, clip, hook) for hook in (False, True)), strict=True):
        assert torch.equal(without, with_hook)
