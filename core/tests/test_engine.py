"""The engine: the order of calls, what it tells plugins, and what it says when it cannot go on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import powertrain
from powertrain import hookimpl
from powertrain.errors import (
    BatchError,
    CheckpointError,
    CheckpointMismatch,
    ConfigError,
    DataError,
    EngineError,
    OptimizerError,
    PrecisionError,
)
from powertrain.plugin import NoConfig, Phase, Plugin


class Net(nn.Module):
    """One layer and a buffer; returns its loss."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * self.scale).square().mean()


def batch(samples: int = 4) -> torch.Tensor:
    return torch.arange(samples * 3, dtype=torch.float32).view(samples, 3) / 10


def start(config: dict[str, Any] | None = None, model: nn.Module | None = None, **arguments: Any) -> powertrain.Engine:
    torch.manual_seed(1)
    return powertrain.initialize(Net() if model is None else model, config, **arguments)


def weights(engine: powertrain.Engine) -> list[torch.Tensor]:
    return [value.detach().clone() for value in engine.module.state_dict().values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Listener(Plugin[NoConfig]):
    """Notes every event with its arguments."""

    name, api = "listener", 1

    def __init__(self) -> None:
        super().__init__(NoConfig())
        self.seen: list[Any] = []

    def named(self) -> list[str]:
        return [event for event, _ in self.seen]

    @hookimpl
    def on_engine_ready(self, engine: Any) -> None:
        self.seen.append(("ready", engine))

    @hookimpl
    def on_step_start(self, engine: Any) -> None:
        self.seen.append(("start", engine.global_step))

    @hookimpl
    def on_step_end(self, engine: Any, loss: Any) -> None:
        self.seen.append(("end", (engine.global_step, loss)))

    @hookimpl
    def on_checkpoint_saved(self, directory: str, tag: str) -> None:
        self.seen.append(("saved", (directory, tag)))

    @hookimpl
    def on_error(self, error: BaseException) -> None:
        self.seen.append(("error", error))

    @hookimpl
    def on_close(self) -> None:
        self.seen.append(("close", None))


# --- it trains -------------------------------------------------------------------------------


def test_an_empty_config_trains() -> None:
    """``powertrain.initialize(model)`` is enough: the loss falls, and any batch size is taken."""
    with powertrain.initialize(Net()) as engine:
        losses = [float(engine.train_step(batch(n))) for n in (4, 4, 4)]
        engine.train_step(batch(7))
    assert losses[2] < losses[0]
    assert engine.global_step == 4
    assert engine.learning_rate == 1e-3
    assert (engine.data_rank, engine.data_size) == (0, 1)
    assert engine.loader is None
    assert engine.client_state == {}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs: torch.Tensor, offset: torch.Tensor) -> Any:
        return SimpleNamespace(loss=(self.layer(inputs) + offset).square().mean(), logits=None)


def test_batches_may_be_dicts() -> None:
    """A dict is split along dimension 0 and given by keyword; the loss is the output's attribute."""
    with start({"batch": {"accumulation": 2}}, Named()) as engine:
        given = {"inputs": batch(), "offset": torch.ones(4, 2)}
        before = float(engine.eval_step(given))
        assert float(engine.train_step(given)) == pytest.approx(before)
        assert float(engine.train_step(given)) < before


def test_the_loss_may_be_a_function() -> None:
    """``loss_fn`` compares a model's output with the last element of the batch."""
    with start(model=nn.Linear(3, 2), loss_fn=nn.CrossEntropyLoss()) as engine:
        expected = nn.functional.cross_entropy(engine.module(batch()), torch.tensor([0, 1, 0, 1]))
        assert torch.equal(engine.train_step((batch(), torch.tensor([0, 1, 0, 1]))), expected.detach())


def test_a_dataset_becomes_local_batches() -> None:
    """``engine.loader`` yields micro x accumulation samples, each once an epoch."""
    data = TensorDataset(torch.arange(14.0).view(14, 1))
    with start({"batch": {"micro": 2, "accumulation": 3}}, nn.Linear(1, 1), dataset=data) as engine:
        assert engine.loader is not None
        seen = [x for (x,) in engine.loader]
    assert [len(x) for x in seen] == [6, 6]
    assert len(set(torch.cat(seen).view(-1).tolist())) == 12


def test_engines_live_side_by_side() -> None:
    """Two engines in one process train as each does alone."""

    def losses(*engines: powertrain.Engine) -> list[list[float]]:
        return [[float(engine.train_step(batch())) for engine in engines] for _ in range(3)]

    alone = [[a[0], b[0]] for a, b in zip(losses(start()), losses(start({"optimizer": {"lr": 0.1}})), strict=True)]
    together = losses(start(), start({"optimizer": {"lr": 0.1}}))
    assert together == alone


# --- the order of calls ------------------------------------------------------------------------


def test_a_step_needs_a_forward_pass() -> None:
    """``step()`` before any forward pass, or twice, is an EngineError that gives the order."""
    with start() as engine:
        for _ in range(2):
            with pytest.raises(EngineError, match=r"step\(\) without a forward pass") as caught:
                engine.step()
            assert caught.value.code == "PT420"
            assert "engine.backward(loss)" in caught.value.remedy
            engine.backward(engine(batch()))
            assert engine.step()


def test_a_closed_engine_does_nothing() -> None:
    """After ``close`` every call is an EngineError, and closing again is nothing."""
    engine = start()
    engine.close()
    engine.close()
    calls = (
        lambda: engine.train_step(batch()),
        lambda: engine.eval_step(batch()),
        lambda: engine(batch()),
        lambda: engine.loss(batch()),
        lambda: engine.save_checkpoint("x"),
        lambda: engine.load_checkpoint("x"),
    )
    for call in calls:
        with pytest.raises(EngineError, match="the engine is closed"):
            call()


def test_leaving_the_block_closes() -> None:
    """A ``with`` block closes the engine, after an exception too, which passes unchanged."""
    listener = Listener()
    with pytest.raises(KeyError, match="mine"), start(plugins=[listener]) as engine:
        raise KeyError("mine")
    assert listener.named() == ["ready", "close"]
    with pytest.raises(EngineError):
        engine.train_step(batch())


def test_no_sync_is_legal_everywhere() -> None:
    """``no_sync`` around anything changes no result, nested and around whole steps too."""
    plain, other = start({"batch": {"accumulation": 2}}), start({"batch": {"accumulation": 2}})
    plain.train_step(batch())
    with other.no_sync(), other.no_sync():
        other.train_step(batch())
    assert same(weights(plain), weights(other))


# --- batches that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "given", "says"),
    [
        ({"micro": 2, "accumulation": 3}, batch(5), ["6 = micro 2 x accumulation 3", "found: 5"]),
        ({"total": 4}, batch(3), ["4 = micro 4 x accumulation 1"]),
        ({"accumulation": 2}, batch(5), ["a multiple of accumulation 2", "5 samples"]),
        ({"accumulation": 3}, iter([batch(1), batch(1)]), ["ran out of micro-batches", "3 of them", "found: 2"]),
        ({}, iter([]), ["ran out of micro-batches", "found: 0"]),
        ({}, batch(0), ["the batch is empty"]),
        ({}, {"text": "no tensor"}, ["holds no tensor with a dimension to split"]),
    ],
)
def test_batches_of_the_wrong_size_are_refused(table: dict[str, int], given: Any, says: list[str]) -> None:
    """A local batch of another size is a BatchError with the arithmetic, and nothing is updated."""
    with start({"batch": table}) as engine:
        before = weights(engine)
        with pytest.raises(BatchError) as caught:
            engine.train_step(given)
        assert caught.value.code == "PT400"
        assert all(text in str(caught.value) for text in says)
        assert engine.global_step == 0
        assert same(weights(engine), before)


def test_contradicting_sizes_name_their_place(tmp_path: Path) -> None:
    """Batch sizes that do not fit are a ConfigError with the line of the file."""
    file = tmp_path / "train.toml"
    file.write_text("[batch]\nmicro = 3\naccumulation = 1\n\ntotal = 8\n")
    with pytest.raises(ConfigError, match=r"train\.toml:5:1.*micro 3 x accumulation 1"):
        powertrain.initialize(Net(), file)


def test_the_context_has_every_value() -> None:
    """Plugins see derived values in the configuration, with what they were derived from."""
    with start({"batch": {"total": 12, "accumulation": 3}, "precision": {"compute": "bf16"}}) as engine:
        config = engine.context.config
    assert (config.batch.micro, engine.context.batch.micro) == (4, 4)
    assert "derived from batch.total" in str(config.origins["batch.micro"])
    assert config.precision.master == "fp32"
    assert config.checkpoint.directory == "runs/checkpoints"


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter([torch.ones(3)])


def test_datasets_that_cannot_be_dealt_out_are_refused() -> None:
    """A dataset shorter than a batch, and one without items by index, are a DataError each."""
    with pytest.raises(DataError, match="has 3 samples, fewer than one global batch"):
        start({"batch": {"total": 4}}, dataset=TensorDataset(torch.ones(3, 3)))
    with pytest.raises(DataError, match="no length and no items by index") as caught:
        start(dataset=Endless())
    assert caught.value.found == "Endless"
    assert "engine.train_step" in caught.value.remedy


# --- one step, looked at closely ---------------------------------------------------------------------


def test_an_exception_leaves_nothing_behind() -> None:
    """After a step that raised half-way, the next one is as if it had never been."""
    config = {"batch": {"accumulation": 2}, "optimizer": {"lr": 0.1}}
    engine, untouched = start(config), start(config)

    def broken() -> Any:
        yield batch(2) * 1000
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        engine.train_step(broken())
    assert engine.global_step == 0
    for one in (engine, untouched):
        one.train_step(batch())
    assert same(weights(engine), weights(untouched))


def test_the_gradient_norm_is_before_clipping() -> None:
    """``grad_norm`` is None before the first step, then the global norm of the mean gradient, unclipped."""
    for clip in ({}, {"clip": 1e-3}):
        with start({"batch": {"accumulation": 2}, "optimizer": clip}) as engine:
            assert engine.grad_norm is None
            model = Net()
            model.load_state_dict(engine.module.state_dict())
            model(batch()).backward()
            expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            engine.train_step(batch())
            assert engine.grad_norm == pytest.approx(float(expected), rel=1e-5)
            assert engine.grad_norm == engine.grad_norm


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 64), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.layer(x)).square().mean()


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_has_no_dropout_and_restores_the_mode(mode: bool) -> None:
    """``eval_step`` gives the same loss each time, makes no gradient, and leaves the mode as it was."""
    with start({"batch": {"micro": 2, "accumulation": 2}}, Dropout()) as engine:
        engine.module.train(mode)
        losses = {float(engine.eval_step(batch(n))) for n in (4, 4)}
        assert len(losses) == 1
        assert engine.module.training is mode
        assert all(p.grad is None for p in engine.module.parameters())
        engine.module.eval()
        assert losses.pop() == pytest.approx(float(engine.module(batch()).detach()))
        engine.eval_step(batch(5))  # no multiple of the micro-batch: weighted by samples
        assert engine.global_step == 0


def test_evaluation_restores_the_mode_after_an_error() -> None:
    """A failing evaluation leaves the model in training mode."""
    with start() as engine:
        engine.module.train()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            engine.eval_step(torch.ones(2, 5))
        assert engine.module.training


def test_an_overflow_skips_the_step() -> None:
    """An infinite gradient: no update, counted, the scale halved, the schedule where it was; then on as before."""
    config = {
        "precision": {"loss_scale": "dynamic"},
        "scheduler": {"name": "linear", "steps": 10},
        "optimizer": {"lr": 0.1},
    }
    with start(config) as engine:
        rate, before = engine.learning_rate, weights(engine)
        engine.train_step(torch.full((4, 3), float("inf")))
        assert (engine.global_step, engine.skipped_steps) == (1, 1)
        assert engine.loss_scale.value == 32768.0
        assert engine.learning_rate == rate
        assert same(weights(engine), before)
        engine.train_step(batch())
        assert (engine.global_step, engine.skipped_steps) == (2, 1)
        assert engine.learning_rate < rate
        assert not same(weights(engine), before)


def test_overflow_for_good_ends_the_run() -> None:
    """When the scale has fallen to 1 and gradients are still infinite, the run ends with a PrecisionError."""
    with start({"precision": {"loss_scale": "dynamic"}}) as engine:
        with pytest.raises(PrecisionError, match="are not finite although") as caught:
            for _ in range(20):
                engine.train_step(torch.full((4, 3), float("nan")))
        assert caught.value.found == "17 steps skipped so far"


def test_a_model_that_makes_no_loss_is_refused() -> None:
    """A model that returns no scalar, and no loss function, is an EngineError that offers both ways out."""
    with (
        start(model=nn.Linear(3, 2)) as engine,
        pytest.raises(EngineError, match="the model returned no loss") as error,
    ):
        engine.train_step(batch())
    assert "loss_fn=" in error.value.remedy


# --- optimizers and schedulers of the caller's ----------------------------------------------------------


def test_the_callers_optimizer_is_used() -> None:
    """An optimizer object, or a function that makes one, replaces ``[optimizer]``."""
    model = Net()
    given = torch.optim.SGD(model.parameters(), lr=0.25)
    with start(model=model, optimizer=given) as engine:
        assert engine.optimizer_wrapper.optimizer is given
        assert engine.learning_rate == 0.25
    with start(optimizer=lambda params: torch.optim.SGD(params, lr=0.125)) as engine:
        before = engine.module.layer.weight.detach().clone()
        engine.train_step(batch())
        assert torch.equal(engine.module.layer.weight, before - 0.125 * engine.module.layer.weight.grad)
    with pytest.raises(OptimizerError, match="made no optimizer") as caught:
        start(optimizer=lambda params: list(params))
    assert caught.value.found == "list"


def test_the_start_says_in_which_formats_it_trains(caplog: pytest.LogCaptureFixture) -> None:
    """One line names ranks, batch and every format."""
    with caplog.at_level("INFO", logger="powertrain"), start({"precision": {"compute": "bf16"}}):
        pass
    (line,) = [record.getMessage() for record in caplog.records if "precision:" in record.getMessage()]
    for part in ("1 rank(s) on cpu", "compute bf16", "master fp32", "reduce ", "accumulate ", "state fp32"):
        assert part in line


def test_parameters_of_others_are_refused() -> None:
    """What is not part of the model would be neither averaged nor saved: an error, with its group and shape."""
    model, temperature = Net(), torch.nn.Parameter(torch.ones(2, 5))
    groups = [{"params": list(model.parameters())}, {"params": [temperature]}]
    for optimizer in (torch.optim.SGD(groups, lr=1.0), lambda params: torch.optim.SGD([*params, temperature], lr=1.0)):
        with pytest.raises(OptimizerError, match="are not the model's") as caught:
            start(model=model, optimizer=optimizer)
        assert "(2, 5)" in caught.value.found
        assert "submodule" in caught.value.remedy


def test_a_model_belongs_to_one_engine() -> None:
    """A second engine on a model is refused while the first is open, and works after it, or after one that failed."""
    model = Net()
    with start(model=model), pytest.raises(EngineError, match="holds this model already"):
        start(model=model)
    with pytest.raises(ZeroDivisionError):
        start(model=model, scheduler=lambda optimizer: 1 / 0)

    class Failing(powertrain.Plugin):
        name, api = "failing", 1

        @powertrain.hookimpl
        def on_engine_ready(self, engine: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start(model=model, plugins=[Failing(None)])
    with start(model=model) as engine:
        engine.train_step(batch())


def test_the_callers_scheduler_is_used() -> None:
    """A torch scheduler, or a function that makes one, replaces ``[scheduler]``."""
    model = Net()
    given = torch.optim.SGD(model.parameters(), lr=1.0)
    for scheduler in (
        torch.optim.lr_scheduler.StepLR(given, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    ):
        given.param_groups[0]["lr"] = 1.0
        with start(model=model, optimizer=given, scheduler=scheduler) as engine:
            rates = []
            for _ in range(4):
                rates.append(engine.learning_rate)
                engine.train_step(batch())
        assert rates == [1.0, 1.0, 0.5, 0.5]


def test_a_model_with_nothing_to_train_is_refused() -> None:
    """A model without a trainable parameter is an OptimizerError."""
    with pytest.raises(OptimizerError, match="no parameter that requires a gradient"):
        start(model=Net().requires_grad_(False))


# --- plugins -------------------------------------------------------------------------------------------


def test_events_come_in_order() -> None:
    """ready, then start and end of each step with its number and loss, then close."""
    listener = Listener()
    with start(plugins=[listener]) as engine:
        loss = engine.train_step(batch())
        engine.backward(engine(batch()))
        engine.step()
        engine.eval_step(batch())
    assert listener.named() == ["ready", "start", "end", "start", "end", "close"]
    assert listener.seen[0][1] is engine
    assert [value for event, value in listener.seen if event == "start"] == [0, 1]
    assert listener.seen[2][1] == (1, loss)
    assert listener.seen[4][1] == (2, None)


def test_an_error_is_told_once() -> None:
    """A step that raises tells plugins once, with the exception that leaves the engine."""
    listener = Listener()
    with start({"checkpoint": {"every": 1}}, plugins=[listener]) as engine:
        with pytest.raises(RuntimeError) as caught:
            engine.train_step(torch.ones(2, 5))
        assert listener.named() == ["ready", "start", "error"]
        assert listener.seen[2][1] is caught.value


class Transform(Plugin[NoConfig]):
    """Counts how often it is asked, and wraps the model."""

    api = 1

    def __init__(self, seen: list[str]) -> None:
        super().__init__(NoConfig())
        self.seen = seen

    @hookimpl
    def transform_model(self, model: nn.Module) -> nn.Module:
        self.seen.append(self.name)
        return nn.Sequential(model)


class Sharding(Transform):
    name, phase = "sharding", Phase.SHARD


class Compression(Transform):
    name, phase = "compression", Phase.COMPRESS


class Recompute(Transform):
    name, phase = "recompute", Phase.RECOMPUTE


def test_each_transform_runs_once_by_phase() -> None:
    """Transforms run once each, by phase, each on what the one before returned."""
    seen: list[str] = []
    with start(plugins=[Sharding(seen), Recompute(seen), Compression(seen)]) as engine:
        assert seen == ["compression", "recompute", "sharding"]
        assert isinstance(engine.module[0][0][0], Net)
        engine.train_step(batch())


# --- checkpoints ----------------------------------------------------------------------------------------


def test_automatic_saves_follow_the_table(tmp_path: Path) -> None:
    """``every`` saves, ``keep_last`` deletes the older ones, and each save is announced."""
    listener = Listener()
    table = {"directory": str(tmp_path), "every": 2, "keep_last": 2}
    with start({"checkpoint": table}, plugins=[listener]) as engine:
        for _ in range(7):
            engine.train_step(batch())
    saved = [value for event, value in listener.seen if event == "saved"]
    assert saved == [(str(tmp_path), f"step-{k:08d}") for k in (2, 4, 6)]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("step")) == [
        "step-00000004",
        "step-00000006",
    ]


def test_asynchronous_saves_are_complete_after_close(tmp_path: Path) -> None:
    """What was saved in the background is announced, and loads what was there when it was asked for."""
    listener = Listener()
    table = {"directory": str(tmp_path), "asynchronous": True}
    with start({"checkpoint": table}, plugins=[listener]) as engine:
        engine.train_step(batch())
        engine.save_checkpoint(tag="mine")
        expected = weights(engine)
        engine.train_step(batch())
    assert [value for event, value in listener.seen if event == "saved"] == [(str(tmp_path), "mine")]
    with start({"checkpoint": table}) as engine:
        assert engine.load_checkpoint().tag == "mine"
        assert same(weights(engine), expected)


def test_the_default_directory_is_below_the_output(tmp_path: Path) -> None:
    """Without a directory, checkpoints go to ``checkpoints`` under ``[run] output``."""
    config = {"run": {"output": str(tmp_path / "here")}}
    with start(config) as engine:
        engine.train_step(batch())
        assert engine.save_checkpoint(client_state={"epoch": 3}) == "step-00000001"
        engine.train_step(batch())
        assert engine.save_checkpoint() == "step-00000002"
    assert (tmp_path / "here/checkpoints/step-00000002").is_dir()
    with start(config) as engine:
        report = engine.load_checkpoint(tag="step-00000001")
        assert (report.step, report.world_size, report.fresh) == (1, 1, [])
        assert report.client_state == engine.client_state == {"epoch": 3}
        assert str(report).startswith("step-00000001: step 1, ")
        assert engine.load_checkpoint().step == 2
        assert engine.client_state == {}


def test_a_state_that_is_not_json_is_refused(tmp_path: Path) -> None:
    """``client_state`` that JSON cannot hold is a CheckpointError, and nothing is saved."""
    with start() as engine:
        with pytest.raises(CheckpointError, match="not JSON") as caught:
            engine.save_checkpoint(str(tmp_path), client_state={"when": object()})
        assert caught.value.where == "values.client.when"
    assert not list(tmp_path.glob("step-*"))


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layers(x) * self.scale).mean()


def test_another_model_loads_nothing(tmp_path: Path) -> None:
    """Names and shapes that differ are listed with suggestions, and the engine is as before."""
    with start() as engine:
        engine.train_step(batch())
        engine.save_checkpoint(str(tmp_path))
    with start(model=Other()) as engine:
        before, generator = weights(engine), torch.get_rng_state()
        with pytest.raises(CheckpointMismatch, match="was made from another model: 5 tensors differ") as caught:
            engine.load_checkpoint(str(tmp_path))
        assert (caught.value.code, caught.value.exit_code) == ("PT606", 2)
        text = str(caught.value)
        assert "layers.weight: not in the checkpoint; did you mean 'layer.weight'?" in text
        assert "layer.bias: in the checkpoint, not in the model" in text
        assert "scale: shape (1,) in the checkpoint, (2,) in the model" in text
        assert same(weights(engine), before)
        assert engine.global_step == 0
        assert torch.equal(torch.get_rng_state(), generator)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("passing", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.first(x))).pow(2).add(self.first(x)).mean()


def test_buffers_and_ties_are_saved(tmp_path: Path) -> None:
    """Buffers come back, a tied parameter is saved once under its first name, and stays tied."""
    with start(model=Tied()) as engine:
        for _ in range(3):
            engine.train_step(batch())
        engine.save_checkpoint(str(tmp_path))
        expected = weights(engine)
    with start(model=Tied()) as engine:
        report = engine.load_checkpoint(str(tmp_path))
        assert same(weights(engine), expected)
        assert engine.module.first.weight is engine.module.second.weight
    names = [name for name in report.loaded if name.startswith("model/")]
    assert "model/norm.running_mean" in names
    assert "model/norm.num_batches_tracked" in names
    assert not {"model/second.weight", "model/passing"} & set(names)


def test_a_loaded_engine_drops_a_half_done_step(tmp_path: Path) -> None:
    """Loading in the middle of an accumulation forgets the gradients gathered so far."""
    config = {"batch": {"accumulation": 2}}
    with start(config) as engine:
        engine.save_checkpoint(str(tmp_path))
        engine.train_step(batch())
        expected = weights(engine)
        engine.backward(engine(batch(2) * 100))
        engine.load_checkpoint(str(tmp_path))
        engine.train_step(batch())
        assert same(weights(engine), expected)


def test_a_torch_schedulers_position_is_saved(tmp_path: Path) -> None:
    """A torch scheduler with numbers as keys goes on after a resume as it would have."""
    milestones = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2, 4])
    with start(scheduler=milestones) as engine:
        for _ in range(3):
            engine.train_step(batch())
        engine.save_checkpoint(str(tmp_path))
    with start(scheduler=milestones) as engine:
        engine.load_checkpoint(str(tmp_path))
        rates = [engine.learning_rate]
        for _ in range(2):
            engine.train_step(batch())
            rates.append(engine.learning_rate)
    assert rates == pytest.approx([1e-4, 1e-5, 1e-5])
