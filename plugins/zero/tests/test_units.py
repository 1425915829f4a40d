"""How a model is cut into units."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import nn

from powertrain.errors import ShardingError
from powertrain_zero.flat import flat_layout
from powertrain_zero.units import ROOT, kinds, plan_buckets, plan_units


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(16))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.moe = Experts()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.token.weight


WEIGHTS = ("weight", "bias")


def names(model: nn.Module, unit: object = None) -> list[str]:
    return [plan.name for plan in plan_units(model, unit)]  # type: ignore[arg-type]


def test_the_repeated_block_is_found_although_it_holds_longer_lists() -> None:
    """Blocks of many experts are units, not the experts; what is left is the root, a tied weight once."""
    plans = plan_units(Model(), None)
    assert [plan.name for plan in plans] == [ROOT, "blocks.0", "blocks.1", "blocks.2"]
    assert [name for name, _ in plans[0].params] == ["token.weight"]
    assert plans[0].whole_pass
    assert set(plans[0].paths) == {"", "token", "head"}
    assert sum(plan.numel for plan in plans) == sum(p.numel() for p in Model().parameters())


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.own = nn.Linear(4, 4)
        self.inner = inner


def test_a_module_that_units_share_is_the_roots() -> None:
    """What several blocks hold, or a block and what is outside of it, stays while any of them runs."""
    shared = nn.Linear(4, 4)
    (root, *units) = plan_units(nn.ModuleList(Around(shared) for _ in range(3)), None)
    assert [name for name, _ in root.params] == ["0.inner.weight", "0.inner.bias"]
    assert [name for unit in units for name, _ in unit.params] == [f"{i}.own.{n}" for i in range(3) for n in WEIGHTS]
    model = nn.ModuleDict({"blocks": nn.ModuleList(Around(nn.Linear(4, 4)) for _ in range(2))})
    model["head"] = model["blocks"][1].inner  # type: ignore[index]
    root = plan_units(model, None)[0]
    assert [name for name, _ in root.params] == ["blocks.1.inner.weight", "blocks.1.inner.bias"]


def test_a_block_that_stands_twice_is_one_unit() -> None:
    """A list may hold the same block again; a unit within another keeps its parameters wherever it is met."""
    block = Around(nn.Linear(4, 4))
    model = nn.ModuleList([block, block, Around(nn.Linear(4, 4))])
    assert names(model) == ["0", "2"]
    plans = plan_units(nn.ModuleList([block, Around(block.inner)]), ["*", "*.inner"])
    assert [(plan.name, len(plan.params)) for plan in plans] == [("0", 2), ("0.inner", 2), ("1", 2)]


def test_encoder_and_decoder_blocks_are_units() -> None:
    """Every instance of the repeated class is a unit, in whatever list it stands."""
    model = nn.ModuleDict({side: nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for side in ("encoder", "decoder")})
    assert names(model) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]


def test_a_model_without_repetition_is_one_unit() -> None:
    """Where nothing repeats, all is the root."""
    assert names(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.LayerNorm(3))) == [ROOT]


def test_units_by_class_path_and_size() -> None:
    """A class name takes all its instances, nested ones too; patterns name modules; a number cuts by size."""
    assert len(names(Model(), "Linear")) == 1 + 48
    assert names(Model(), ["blocks.*"]) == [ROOT, "blocks.0", "blocks.1", "blocks.2"]
    nested = plan_units(Model(), ["blocks.1", "blocks.1.moe"])
    assert [plan.name for plan in nested] == [ROOT, "blocks.1", "blocks.1.moe"]
    assert [name for name, _ in nested[1].params] == ["blocks.1.norm.weight", "blocks.1.norm.bias"]
    model = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(5)))
    assert [plan.numel for plan in plan_units(model, 250)] == [200, 200, 100]
    assert [plan.paths for plan in plan_units(model, 250)] == [("0", "1"), ("2", "3"), ("4",)]
    assert [plan.numel for plan in plan_units(model, 1)] == [100] * 5


def test_a_weight_that_units_share_is_the_roots() -> None:
    """A parameter used by two units is gathered while either may run."""
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model[2].weight = model[0].weight
    plans = {plan.name: [name for name, _ in plan.params] for plan in plan_units(model, None)}
    assert plans == {ROOT: ["0.weight"], "0": ["0.bias"], "1": ["1.weight", "1.bias"], "2": ["2.bias"]}


@pytest.mark.parametrize(
    ("unit", "says"),
    [
        ("Blok", "did you mean 'Block'"),
        ("Blok", "Linear (49)"),
        (["block.*"], "blocks.0"),
        (["blocks.*", "blocks.7"], "'blocks.7'"),
        (["hed"], "did you mean 'head'"),
        (["blocks"], '"blocks.*"'),
    ],
)
def test_a_unit_that_matches_nothing_lists_the_candidates(unit: object, says: str) -> None:
    """The error shows what there is, and what was probably meant."""
    with pytest.raises(ShardingError) as caught:
        plan_units(Model(), unit)  # type: ignore[arg-type]
    assert caught.value.code == "PT460"
    assert says in str(caught.value)


def test_buckets_are_runs_of_parameters() -> None:
    """Stages 1 and 2 cut in the order of registration; a larger parameter stands alone; frozen ones count too."""
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(100, 10), nn.Linear(2, 2)).requires_grad_(True)
    plans = plan_buckets(model, 120)
    assert [[name for name, _ in plan.params] for plan in plans] == [
        ["0.weight", "0.bias"], ["1.weight"], ["1.bias", "2.weight", "2.bias"]
    ]  # fmt: skip
    assert torch.tensor([plan.numel for plan in plans]).tolist() == [110, 1000, 16]


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_buckets_of_whole_matrices_fill_their_slices(shards: int) -> None:
    """Where matrices lie in one slice each, buckets go on until little is padding; vectors may still be cut."""
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(33)))
    whole = frozenset(param for param in model.parameters() if param.ndim == 2)
    assert len(plan_buckets(model, 500)) == 33
    plans = plan_buckets(model, 500, whole, shards)
    assert [name for plan in plans for name, _ in plan.params] == [name for name, _ in model.named_parameters()]
    laid = [
        flat_layout(named, shards, whole_tensors=kind.whole)
        for plan in plans
        for kind, named in kinds(plan, torch.float32, whole).items()
        if kind.whole
    ]
    assert sum(layout.numel for layout in laid) <= 1.3 * 33 * 400
    assert len(plans) >= 33 // shards // 2


def test_what_lies_apart() -> None:
    """Trainable or frozen, each format, and what must come whole: a buffer each, of parameters by their names."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(True)
    model[1].requires_grad_(False)
    (plan,) = plan_buckets(model, 1000)
    whole = frozenset({model[0].weight, model[1].weight})
    found = {tuple(attrs.astuple(kind)): [name for name, _ in named]
             for kind, named in kinds(plan, torch.bfloat16, whole).items()}  # fmt: skip
    assert found == {
        (True, torch.bfloat16, True): ["0.weight"],
        (True, torch.bfloat16, False): ["0.bias"],
        (False, torch.bfloat16, False): ["1.weight", "1.bias"],
    }
