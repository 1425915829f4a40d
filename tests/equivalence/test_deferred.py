"""A deferred model on several ranks is the eager one: the first rank's values, everywhere."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from torch import nn

import powertrain


class Model(nn.Module):
    """``plain.Net`` with what draws from several places: its own generator, a constant of the rank, a buffer."""

    def __init__(self, own: torch.Generator, offset: float) -> None:
        super().__init__()
        self.net = plain.Net()
        nn.init.trunc_normal_(self.net.second.weight, std=0.2)
        nn.init.normal_(self.net.head.weight, generator=own)
        with torch.no_grad():
            self.net.first.bias.add_(torch.tensor([offset]))
        self.register_buffer("noise", torch.randn(plain.CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + self.noise


def train(config: dict[str, Any], *, defer: bool, vary: bool) -> dict[str, Any]:
    """Train from a seed that differs between the ranks if ``vary``; run on every rank."""
    from powertrain.environment import Rank

    rank = Rank.from_environment().index if vary else 0
    torch.manual_seed(3 + rank)
    own = torch.Generator().manual_seed(5 + rank)
    if defer:
        with powertrain.deferred():
            model = Model(own, float(rank))
        assert all(param.is_meta for param in model.parameters())
    else:
        model = Model(own, float(rank))
    with powertrain.initialize(model, config, loss_fn=nn.CrossEntropyLoss()) as engine:
        mine = plain.piece(plain.make_data(), engine.data_rank, engine.data_size)
        losses = [float(engine.train_step(mine)) for _ in range(4)]
    return {"losses": losses, "state": {key: value.clone() for key, value in model.state_dict().items()}}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_deferred_and_replicated_is_eager(ranks: Any, compute: str) -> None:
    """Two ranks that built with different seeds and constants train as the first one's eager model does."""
    config = {"precision": {"compute": compute}, "optimizer": {"lr": 1e-3}}
    eager = ranks(2, train, config, defer=False, vary=False)
    late = ranks(2, train, config, defer=True, vary=True)
    for mine in late:
        assert mine["losses"] == eager[0]["losses"]
        assert plain.same_bits(mine["state"], eager[0]["state"])
