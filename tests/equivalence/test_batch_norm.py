"""Buffers that differ between ranks: a checkpoint holds those of one rank, whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain
import torch
from torch import nn

import powertrain

WIDTH = 24
LAYERS = 4


def model() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(plain.FEATURES, WIDTH)]
    for _ in range(LAYERS):
        layers += [nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, plain.CLASSES))


def run(directory: str, load: bool) -> tuple[dict[str, torch.Tensor], float]:
    """Return the buffers, and the loss without training, after three steps or a load."""
    torch.manual_seed(2)
    data = plain.make_data()
    with powertrain.initialize(model(), {"optimizer": {"lr": 1e-2}}, loss_fn=nn.CrossEntropyLoss()) as engine:
        if load:
            engine.load_checkpoint(directory)
        else:
            for _ in range(3):
                engine.train_step(plain.piece(data, engine.data_rank, engine.data_size))
            engine.save_checkpoint(directory)
        engine.module.eval()
        with torch.no_grad():
            loss = float(engine.loss(data))
        return {name: buffer.clone() for name, buffer in engine.module.named_buffers()}, loss


def test_every_rank_loads_the_first_ranks_statistics(ranks: Any, tmp_path: Path) -> None:
    """Means and variances of BatchNorm come from the first data rank together, and its loss without training too."""
    (first, loss), (second, _) = ranks(2, run, str(tmp_path), False)
    assert not plain.same_bits(first, second)
    for world in (1, 2):
        for buffers, resumed in ranks(world, run, str(tmp_path), True):
            assert plain.same_bits(buffers, first)
            assert resumed == loss
