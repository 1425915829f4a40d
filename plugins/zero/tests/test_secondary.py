"""What travels where with a second slice (hpZ) and quantized parameters and gradients: bytes, counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

import powertrain
from powertrain.kernels.blockwise import Blockwise

WIDTH = 64
BLOCKS = 5
SAID = 3 * 8
"""Bytes that a rank of four sends at the end of a forward pass, to say that it needs nothing more."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x))


class Model(nn.Module):
    """Equal blocks, which are units, and a head, which is the root's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def count(zero: dict[str, Any], accumulation: int = 1) -> dict[str, Any]:
    """Return the bytes of a step on this rank, and the elements of each unit's buffer; run on every rank."""
    torch.manual_seed(3)
    config = {"zero": {"stage": 3, **zero}, "observe": {"comm": True}, "batch": {"accumulation": accumulation}}
    with powertrain.initialize(Model(), config, loss_fn=nn.CrossEntropyLoss()) as engine:
        communicator = engine.context.communicator
        batch = (torch.ones(2, WIDTH), torch.zeros(2, dtype=torch.long))

        def step() -> dict[str, int]:
            before = traffic()
            engine.train_step(iter([batch] * accumulation))
            return {
                key: nbytes - before.get(key, 0) for key, nbytes in traffic().items() if nbytes > before.get(key, 0)
            }

        def traffic() -> dict[str, int]:
            totals: Counter[str] = Counter()
            for row in communicator.traffic():
                totals[f"{row.operation} {row.dimension}"] += row.bytes
            return dict(totals)

        step()  # the first one finds out in which order units are gathered
        units = [flat.numel for unit in engine.optimizer_wrapper.units for flat in unit.flats]
        return {"bytes": step(), "units": units}


def test_backward_gathers_within_groups_only(ranks: Any) -> None:
    """With a second slice, units cross the whole dimension once, in forward; backward stays within the group."""
    for result in ranks(4, count, {"secondary": 2}):
        head, *blocks = result["units"]
        everything, again = head + sum(blocks), sum(blocks[:-1])  # the head and the last block stay until backward
        assert result["bytes"]["all_gather data"] == everything * 4 // 4 * 3 + SAID
        assert result["bytes"]["all_gather data.within2"] == again * 4 // 2
    for result in ranks(4, count, {}):
        assert result["bytes"]["all_gather data"] == (everything + again) * 4 // 4 * 3 + SAID
        assert "all_gather data.within2" not in result["bytes"]


def test_later_micro_batches_gather_within_groups(ranks: Any) -> None:
    """The second slice stays valid until the update: only what is not sliced crosses the dimension again."""
    for result in ranks(4, count, {"secondary": 2}, 3):
        head, *blocks = result["units"]
        sliced = sum(blocks[:-1])
        rest = head + blocks[-1]
        assert result["bytes"]["all_gather data"] == (sliced + 3 * rest) * 4 // 4 * 3 + 3 * SAID
        assert result["bytes"]["all_gather data.within2"] == sliced * 5 * 4 // 2


def test_quantized_parameters_take_a_quarter_of_fp32(ranks: Any) -> None:
    """Gathers carry a byte an element and the scales, forward and backward."""
    for result in ranks(4, count, {"gather": "int8"}):
        head, *blocks = result["units"]
        elements = head + sum(blocks) + sum(blocks[:-1])
        assert result["bytes"]["all_gather data"] == Blockwise(8).row_bytes(elements) // 4 * 3 + SAID


def test_quantized_gradients_in_two_hops(ranks: Any) -> None:
    """All elements go within the node, the sums of a node across: bits and scales."""
    for bits in (8, 4):
        codec = Blockwise(bits)  # type: ignore[arg-type]
        for result in ranks(4, count, {"reduce": f"int{bits}", "node": 2}):
            elements = sum(result["units"])
            assert result["bytes"]["all_to_all data.within2"] == codec.row_bytes(elements) // 2
            assert result["bytes"]["all_to_all data.across2"] == codec.row_bytes(elements // 2) // 2
            assert not any(key.startswith("reduce_scatter") for key in result["bytes"])
        for result in ranks(4, count, {"reduce": f"int{bits}"}):
            assert result["bytes"]["all_to_all data"] == codec.row_bytes(elements) // 4 * 3


def test_shard_groups_cross_once_a_step(ranks: Any) -> None:
    """Gathers and reductions of each micro-batch stay within the group; the shard crosses once (MiCS)."""
    for result in ranks(4, count, {"shard_group": 2}, 3):
        elements = sum(result["units"])
        assert result["bytes"]["all_reduce data.across2"] == elements // 2 * 4
        assert result["bytes"]["reduce_scatter data.within2"] == 3 * elements * 4 // 2
        assert {key.split()[1] for key in result["bytes"] if "gather" in key or "scatter" in key} == {"data.within2"}
