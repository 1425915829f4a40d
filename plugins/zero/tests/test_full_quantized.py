"""Parameters made whole are what the masters say, although those of a pass travel quantized."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import sharded
import torch
from torch import nn

import powertrain


def look(settings: dict[str, Any]) -> dict[str, Any]:
    model = sharded.make_tower()
    with powertrain.initialize(model, settings, loss_fn=nn.CrossEntropyLoss()) as engine:
        engine.train_step(sharded.data(4)[engine.data_rank])
        before = sharded.slices(engine)
        with powertrain.full(model):
            seen = {n: p.detach().clone() for n, p in model.named_parameters()}
        with powertrain.full(model.blocks[1].inner.weight, write=True), torch.no_grad():
            model.blocks[1].inner.weight[0, 0] = 7.0
        return {"seen": seen, "before": before, "after": sharded.slices(engine)}


@pytest.mark.parametrize("more", [{}, {"secondary": 2}])
def test_full_shows_and_keeps_masters(ranks, more) -> None:
    results = ranks(4, look, {"zero": {"stage": 3, "gather": "int8", **more}})
    before, after = (sharded.parameters([r[k] for r in results]) for k in ("before", "after"))
    for r in results:
        assert all(torch.equal(r["seen"][n], before[n]) for n in before)
    changed = before["blocks.1.inner.weight"].clone()
    changed[0, 0] = 7.0
    assert plain.same_bits(after, before | {"blocks.1.inner.weight": changed})
