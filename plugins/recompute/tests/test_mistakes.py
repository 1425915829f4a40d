"""What the errors of the section say, before and after the model is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import powertrain_recompute.compiled
from powertrain.cli.root import cli
from powertrain.errors import PowertrainError
from powertrain_recompute.config import RecomputeConfig
from powertrain_recompute.transform import recompute


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ('policy = "ful"', 'did you mean "full"'),
        ("every = 2", 'every belongs to policy = "every", but the policy is "full"'),
        ('policy = "budget"\nsave = ["mm"]', 'save belongs to policy = "selective", but the policy is "budget"'),
        ('policy = "every"\nbudget = 0.5', 'budget belongs to policy = "budget"'),
        ('policy = "every"\nevery = 0', "recompute.every"),
        ('policy = "budget"\nbudget = 1.5', "recompute.budget"),
        ('policy = "selective"\nsave = ["matmull"]', "did you mean 'matmul'"),
        ('policy = "selective"\nsave = ["gelu"]', 'such as "aten.mm.default"'),
        ('policy = "selective"\nsave = []', 'policy = "full"'),
        ('policy = "full"\nblock = "Block"', "did you mean recompute.blocks"),
    ],
)
def test_what_config_check_finds(tmp_path: Path, table: str, says: str) -> None:
    """A wrong value, a key of another policy and an unknown set of operators need no model to be found."""
    path = tmp_path / "a.toml"
    path.write_text(f"[recompute]\n{table}\n")
    result = CliRunner().invoke(cli, ["config", "check", str(path)])
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_policy_that_is_switched_off_keeps_its_table(tmp_path: Path) -> None:
    """One key, or one variable of the environment, switches recomputation off."""
    path = tmp_path / "a.toml"
    path.write_text('[recompute]\npolicy = "none"\nevery = 3\nsave = ["mm"]\nbudget = 0.1\n')
    assert CliRunner().invoke(cli, ["config", "check", str(path)]).exit_code == 0


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"blocks": "Blok"}, ["PT460", "recompute.blocks", "did you mean 'Block'", "Linear (4)"]),
        ({"blocks": ["layer.*"]}, ["recompute.blocks", "layers.0"]),
        ({"blocks": "ModuleList"}, ["layers is a list of modules", '"layers.*"']),
        ({"policy": "every", "every": 4}, ["PT460", "recompute.every", "a number from 1 to 3", "layers.0"]),
        ({"policy": "selective", "save": ["aten.mn.default"]}, ["PT460", "recompute.save", "did you mean"]),
        ({"policy": "selective", "save": ["aten.mm.x"]}, ["recompute.save"]),
        ({"policy": "selective", "save": ["nowhere.attention"]}, ["recompute.save", "import the package"]),
    ],
    ids=str,
)
def test_what_the_model_shows(table: dict[str, Any], says: list[str]) -> None:
    """Names that the model or torch does not have are errors with what there is, and leave the model alone."""
    model = Model()
    with pytest.raises(PowertrainError) as caught:
        recompute(model, RecomputeConfig(**table), torch.device("cpu"))
    for part in says:
        assert part in str(caught.value)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_repeats_nothing() -> None:
    """Without a repeated block the user has to say which modules count."""
    with pytest.raises(PowertrainError, match="repeats no block") as caught:
        recompute(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), RecomputeConfig(), torch.device("cpu"))
    assert "0 (Linear), 1 (Tanh)" in str(caught.value)


def test_of_nested_blocks_the_outer_counts() -> None:
    """A module within a chosen one is not chosen once more."""
    model = Model()
    undo = recompute(model, RecomputeConfig(blocks=["layers.*", "layers.1.mlp"]), torch.device("cpu"))
    assert len(undo) == 3
    assert "forward" not in vars(model.layers[1].mlp)


def test_a_budget_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy that compiles says at once, and before it changes the model, that there is no compiler."""
    monkeypatch.setattr(powertrain_recompute.compiled, "compiler_trouble", lambda: "no g++ here")
    model = Model()
    with pytest.raises(PowertrainError) as caught:
        recompute(model, RecomputeConfig(policy="budget"), torch.device("cpu"))
    for part in ("PT701", "recompute.policy", "no g++ here", 'policy = "selective"'):
        assert part in str(caught.value)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_budget_for_blocks_that_are_compiled() -> None:
    """Blocks that somebody else compiles have a budget already."""
    for how in ("in place", "wrapped"):
        model = Model()
        if how == "in place":
            model.layers[1].compile(backend="eager")
        else:
            model.layers[1] = torch.compile(model.layers[1], backend="eager")  # type: ignore[assignment]
        with pytest.raises(PowertrainError, match="compiled already") as caught:
            config = RecomputeConfig(policy="budget", blocks="layers.*")
            recompute(model, config, torch.device("cpu"), backend="aot_eager_decomp_partition")
        assert "layers.1" in str(caught.value)


def test_a_librarys_own_switch() -> None:
    """A model that recomputes by itself is refused: it would run everything three times."""
    for flag in ("gradient_checkpointing", "grad_checkpointing"):
        model = Model()
        setattr(model.layers[2], flag, False)
        recompute(model, RecomputeConfig(), torch.device("cpu"))
        model = Model()
        setattr(model.layers[2], flag, True)
        with pytest.raises(PowertrainError, match="already") as caught:
            recompute(model, RecomputeConfig(), torch.device("cpu"))
        assert "layers.2" in str(caught.value)
        assert flag in str(caught.value)
