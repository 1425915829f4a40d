"""The plugin: its contract, its names and options, and what is said where something is missing."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import nn

import powertrain
from powertrain import config as configuration
from powertrain.errors import ConfigError, OptimizerError
from powertrain.plugin import NoConfig
from powertrain.roles.optimizer import FlatOptimizer
from powertrain.testing.plugin import PluginContract
from powertrain_optimizers.base import KernelOptimizer
from powertrain_optimizers.factory import CLASSES, factory
from powertrain_optimizers.options import OPTIONS
from powertrain_optimizers.plugin import OptimizersPlugin
from powertrain_optimizers.schedule_free import evaluating

ONLY_IN_TABLES = {"muon": {"adamw_lr", "adamw_weight_decay", "adamw_names"}}


class TestPlugin(PluginContract):
    """What every plugin must do."""

    def plugin(self) -> type[OptimizersPlugin]:
        return OptimizersPlugin


def kind_of(name: str) -> type[KernelOptimizer]:
    made = factory(name, attrs.asdict(OPTIONS[name]()))
    assert made is not None
    optimizer = made(
        [("layer.weight", nn.Parameter(torch.ones(2, 2)))] if made.named else [nn.Parameter(torch.ones(2))]
    )
    assert isinstance(optimizer, FlatOptimizer)
    return type(optimizer)  # type: ignore[return-value]


@pytest.mark.parametrize("name", CLASSES)
def test_tables_and_classes_agree(name: str) -> None:
    """Each name has a class of that kind, whose arguments, defaults included, are the keys of its table."""
    kind = kind_of(name)
    assert kind.kind == name
    arguments = inspect.signature(kind).parameters
    table = OPTIONS[name]()
    keys = {field.name for field in attrs.fields(type(table))} - ONLY_IN_TABLES.get(name, set())
    assert keys == set(arguments) - {"params"}
    for key in keys:
        assert getattr(table, key) == arguments[key].default, key
    assert set(CLASSES) == set(OPTIONS)


@pytest.mark.parametrize("name", CLASSES)
def test_the_configuration_makes_it(name: str) -> None:
    """The section switches the plugin on, and training goes on with the optimizer of the name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    settings = {"optimizers": {}, "optimizer": {"name": name, "lr": 1e-2, "clip": 1.0}}
    batch = (torch.ones(8, 4), torch.ones(8, 1))
    with powertrain.initialize(model, settings, loss_fn=nn.functional.mse_loss) as engine:
        optimizer = engine.optimizer_wrapper.optimizer
        assert (optimizer.kind, optimizer.accelerator.name) == (name, "cpu")
        losses = [float(engine.train_step(batch)) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_without_the_section_nothing_changes() -> None:
    """The installed package alone leaves torch's classes in place."""
    with powertrain.initialize(nn.Linear(2, 1), {}) as engine:
        assert type(engine.optimizer_wrapper.optimizer) is torch.optim.AdamW


def test_a_name_without_the_section_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which section to add, and which package to install where it is not."""
    with pytest.raises(ConfigError) as caught:
        powertrain.initialize(nn.Linear(2, 1), {"optimizer": {"name": "lion"}})
    assert "add the section [optimizers]" in str(caught.value)
    assert "pip install" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        configuration.structure(configuration.read({"optimizer": {"name": "lion"}}), {}, installed=())
    assert "pip install powertrain-optimizers and add the section [optimizers]" in str(caught.value)


def test_a_misspelt_name_is_suggested() -> None:
    """With the section, its names are among the choices."""
    with pytest.raises(ConfigError, match='did you mean "muon"') as caught:
        powertrain.initialize(nn.Linear(2, 1), {"optimizers": {}, "optimizer": {"name": "moun"}})
    assert "add the section" not in str(caught.value)


def test_options_that_do_not_fit_are_refused() -> None:
    """What only the class can see is an OptimizerError with its words."""
    settings = {"optimizers": {}, "optimizer": {"name": "zero_one_adam", "local_step_clipper": 3}}
    with pytest.raises(OptimizerError, match="ZeroOneAdam refuses its options") as caught:
        powertrain.initialize(nn.Linear(2, 1), settings)
    assert "power of 2" in str(caught.value.found)


def test_any_class_by_its_dotted_name() -> None:
    """Classes of torch and of this package go by their dotted names, without the section as well."""
    for name in ("torch.optim.Rprop", "powertrain_optimizers.lion.Lion"):
        with powertrain.initialize(nn.Linear(2, 1), {"optimizer": {"name": name, "lr": 0.1}}) as engine:
            made = engine.optimizer_wrapper.optimizer
            assert f"{type(made).__module__.replace('torch.optim.rprop', 'torch.optim')}.{type(made).__name__}" == name


def test_muon_goes_by_names() -> None:
    """Embedding and head are AdamW's by their names; patterns and AdamW's numbers come from the table."""
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "hidden": nn.Linear(3, 3), "head": nn.Linear(3, 4)})
    table = {"name": "muon", "lr": 0.02, "adamw_lr": 0.003, "adamw_weight_decay": 0.0}

    def matrices(**more: Any) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
        with powertrain.initialize(model, {"optimizers": {}, "optimizer": table | more}) as engine:
            first, second = engine.optimizer_wrapper.optimizer.param_groups
            return [tuple(param.shape) for param in first["params"]], second

    shapes, rest = matrices()
    assert shapes == [(3, 3)]
    assert (rest["lr"], rest["weight_decay"], rest["momentum"]) == (0.003, 0.0, 0.95)
    assert matrices(adamw_names=[])[0] == [(4, 3), (3, 3), (4, 3)]


def test_checkpoints_of_torchs_adamw_continue(tmp_path: Path) -> None:
    """A run saved with torch's AdamW goes on with this package's, and back, as if nothing had happened."""

    def go(settings: dict[str, Any], steps: int, load: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        with powertrain.initialize(model, settings, loss_fn=nn.functional.mse_loss) as engine:
            if load:
                engine.load_checkpoint(str(tmp_path))
            for step in range(steps):
                generator = torch.Generator().manual_seed(engine.global_step)
                engine.train_step((torch.randn(4, 4, generator=generator), torch.ones(4, 3)))
                assert engine.global_step == step + 1 or load
            engine.save_checkpoint(str(tmp_path))
            return [param.detach().clone() for param in model.parameters()]

    whole = go({}, 6, load=False)
    go({}, 2, load=False)
    go({"optimizers": {}}, 2, load=True)
    for mine, theirs in zip(go({}, 2, load=True), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_evaluating_holds_the_average(tmp_path: Path) -> None:
    """In the block the model holds x, in the format in which it computes; after it, what is trained."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    settings = {
        "optimizers": {},
        "optimizer": {"name": "schedule_free_adamw", "lr": 0.1},
        "precision": {"compute": "bf16"},
        "checkpoint": {"directory": str(tmp_path)},
    }
    with powertrain.initialize(model, settings, loss_fn=nn.functional.mse_loss) as engine:
        for _ in range(5):
            engine.train_step((torch.randn(8, 4), torch.ones(8, 1)))
        trained = model.weight.detach().clone()
        with evaluating(engine):
            average = model.weight.detach().clone()
            engine.save_checkpoint(tag="average")
        assert torch.equal(model.weight, trained)
        assert not torch.equal(average, trained)
        assert average.dtype == torch.bfloat16
        engine.train_step((torch.randn(8, 4), torch.ones(8, 1)))
        engine.load_checkpoint(tag="average")
        assert torch.equal(model.weight, average)
        with pytest.raises(OptimizerError, match="hold the average"):
            engine.train_step((torch.randn(8, 4), torch.ones(8, 1)))
        engine.optimizer_wrapper.optimizer.train()
        engine.optimizer_wrapper.publish()
        torch.testing.assert_close(model.weight.detach(), trained, rtol=2**-7, atol=0)
        engine.train_step((torch.randn(8, 4), torch.ones(8, 1)))
    with powertrain.initialize(nn.Linear(4, 1), {}) as engine, pytest.raises(OptimizerError), evaluating(engine):
        pass


def test_the_table_takes_no_key() -> None:
    """The section switches on, and holds nothing."""
    assert OptimizersPlugin(NoConfig()).config == NoConfig()


def test_every_key_is_explained() -> None:
    """The command that explains keys shows those of this package, and torch's own under the names that both have."""
    from click.testing import CliRunner

    from powertrain.cli.config import config

    shown = CliRunner().invoke(config, ["schema", "optimizer"]).output
    for name, table in OPTIONS.items():
        for field in attrs.fields(table):
            assert f"optimizer.{field.name} ({name})" in shown
    assert "optimizer.amsgrad (adamw)" in shown
