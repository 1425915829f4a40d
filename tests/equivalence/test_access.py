"""Access to single parameters through engines in processes of their own, against a plain PyTorch loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import plain
import pytest
import torch
from torch import nn

import powertrain

CONFIG: dict[str, Any] = {"batch": {"accumulation": 2}, "optimizer": {"name": "adamw", "lr": 1e-2, "clip": 0.5}}


def edit_with_engine(config: dict[str, Any]) -> dict[str, Any]:
    """Train two steps, read everything, write a value and a moment, train two more; run on every rank."""
    model = plain.make_model()
    found: dict[str, Any] = {}
    with powertrain.initialize(model, config, loss_fn=nn.CrossEntropyLoss()) as engine:
        mine = plain.piece(plain.make_data(), engine.data_rank, engine.data_size)
        for _ in range(2):
            engine.train_step(mine)
        states = {name: powertrain.state(param) for name, param in model.named_parameters()}
        found["values"] = {name: state.value.full() for name, state in states.items()}
        found["grads"] = {name: s.grad.full() for name, s in states.items() if s.grad is not None}
        found["moments"] = {name: s.optimizer["exp_avg"].full() for name, s in states.items() if name in found["grads"]}
        with powertrain.full(model):
            found["whole"] = {name: param.detach().clone() for name, param in model.named_parameters()}
        first = next(iter(states.values()))
        first.optimizer["exp_avg"].write(torch.ones(first.value.shape), publish=False)
        with powertrain.full(model, write=True), torch.no_grad():
            for param in model.parameters():
                param.mul_(0.5).add_(engine.data_rank)  # the first rank's values win
        for _ in range(2):
            engine.train_step(mine)
        found["stream"] = dict(powertrain.stream(engine))
    return found


def edit_in_plain_loop() -> dict[str, Any]:
    """Do the same in one process without an engine."""
    model, data, found = plain.make_model(), plain.make_data(), {}
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for step in range(4):
        if step == 2:
            named = dict(model.named_parameters())
            found["whole"] = found["values"] = {name: param.detach().clone() for name, param in named.items()}
            found["grads"] = {name: param.grad.clone() for name, param in named.items() if param.grad is not None}
            found["moments"] = {name: optimizer.state[named[name]]["exp_avg"].clone() for name in found["grads"]}
            optimizer.state[next(iter(named.values()))]["exp_avg"].fill_(1)
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(0.5)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        nn.utils.clip_grad_norm_(trainable, 0.5)
        optimizer.step()
    found["stream"] = {name: param.detach().clone() for name, param in model.named_parameters()}
    return found


@pytest.mark.parametrize("stage", [None, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_reads_and_writes_are_the_plain_loops(ranks: Any, n: int, stage: int | None) -> None:
    """Values, gradients and moments are the plain loop's; what is written is trained on as there; ranks agree."""
    config = CONFIG if stage is None else {**CONFIG, "zero": {"stage": stage}}
    runs = ranks(n, edit_with_engine, config)
    expected = edit_in_plain_loop()
    for found in runs:
        assert found["stream"].keys() == expected["stream"].keys() | {"temperature"}
        for kind, tensors in expected.items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(
                    found[kind][name], tensor, rtol=1e-4, atol=1e-6, msg=partial("{} of {}: {}".format, kind, name)
                )
                assert torch.equal(found[kind][name], runs[0][kind][name]), f"{kind} of {name} differs between ranks"
