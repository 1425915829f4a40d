"""The blocks of a model: found, or named."""

from __future__ import annotations

import pytest
from torch import nn

from powertrain.blocks import choose_blocks, outermost, repeated_block
from powertrain.errors import ShardingError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(16))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh())


def test_the_repeated_block() -> None:
    """Of the outermost lists of modules, the class with most parameters; inner lists do not count."""
    assert repeated_block(Model()) is Block
    assert repeated_block(nn.Sequential(nn.Linear(2, 2), nn.Tanh())) is None
    assert repeated_block(nn.Sequential(nn.Tanh(), nn.Tanh())) is None


def test_blocks_by_default_class_and_path() -> None:
    """All come in the model's order; a star stands for one component of a path."""
    model = Model()
    each = ["blocks.0", "blocks.1", "blocks.2"]
    assert choose_blocks(model, None, where="a.b") == each
    assert choose_blocks(model, "Block", where="a.b") == each
    assert choose_blocks(model, "blocks.*", where="a.b") == each
    assert choose_blocks(model, ["head", "blocks.1"], where="a.b") == ["blocks.1", "head"]
    assert len(choose_blocks(model, "Linear", where="a.b")) == 3 * 16 + 1
    assert choose_blocks(nn.Linear(2, 2), None, where="a.b") == []


def test_of_a_class_within_itself_the_outermost() -> None:
    """A block within a block of its class is no block of the model."""
    inner = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert outermost(nn.ModuleList([inner, nn.Sequential()]), nn.Sequential) == ["0", "1"]


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("Blok", "did you mean 'Block'"),
        ("Blok", "Linear (49)"),
        (["block.*"], "blocks.0"),
        (["hed"], "did you mean 'head'"),
        (["blocks"], '"blocks.*"'),
    ],
)
def test_what_matches_nothing(choice: str | list[str], says: str) -> None:
    """The error names the key of the caller, shows what there is, and what was probably meant."""
    with pytest.raises(ShardingError) as caught:
        choose_blocks(Model(), choice, where="section.key")
    assert says in str(caught.value)
    assert caught.value.where == "section.key"


def test_the_callers_remedy() -> None:
    """Who takes more than names says so."""
    with pytest.raises(ShardingError, match="or a number"):
        choose_blocks(Model(), "Nothing", where="a.b", remedy="name a class, or a number")
