"""Replicated data parallel against the plain PyTorch loop: one recipe, one mathematics."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from torch import nn

import powertrain

STEPS = 10


def train(config: dict[str, Any], steps: int = STEPS, how: str = "train_step") -> dict[str, Any]:
    """Train ``plain.Net`` with an engine; run on every rank."""
    model = plain.make_model()
    engine = powertrain.initialize(model, config, loss_fn=nn.CrossEntropyLoss())
    losses, norms = [], []
    with engine:
        mine = plain.piece(plain.make_data(), engine.data_rank, engine.data_size)
        accumulation = engine.context.batch.accumulation
        micros = [plain.piece(mine, k, accumulation) for k in range(accumulation)]
        for _ in range(steps):
            if how == "train_step":
                losses.append(float(engine.train_step(mine)))
            elif how == "iterator":
                losses.append(float(engine.train_step(iter(micros))))
            elif how == "no_sync":
                with engine.no_sync():
                    for micro in micros[:-1]:
                        engine.backward(engine(micro))
                engine.backward(engine(micros[-1]))
                assert engine.step()
            elif how == "all in no_sync":
                with engine.no_sync():
                    for micro in micros:
                        engine(micro).backward()
                assert engine.step()
            else:
                for k, micro in enumerate(micros):
                    loss = engine(micro)
                    loss.backward() if how == "loss.backward" else engine.backward(loss)
                    assert engine.step() == (k == accumulation - 1)
            norms.append(engine.grad_norm)
        names = [name for name, _ in plain.Net().named_parameters()]
        masters = {s.name[6:]: s.tensor.clone().view(s.shape) for s in engine.optimizer_wrapper.tensors()}
        params = {name: masters[name] for name in names}
        skipped = engine.skipped_steps
    return {"losses": losses, "norms": norms, "params": params, "skipped": skipped, "step": engine.global_step}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_one_rank_is_bit_equal(accumulation: int, clip: float | None) -> None:
    """Alone, losses, norms and parameters are the plain loop's, bit for bit."""
    config: dict[str, Any] = {"batch": {"accumulation": accumulation}, "optimizer": {"lr": 1e-3}}
    if clip:
        config["optimizer"]["clip"] = clip
    mine, theirs = train(config), plain.plain_loop(STEPS, pieces=accumulation, clip=clip)
    assert plain.same_bits(mine["params"], theirs["params"])
    assert mine["norms"] == theirs["norms"]
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-6)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_change_nothing(ranks: Any, world: int, accumulation: int, clip: float | None) -> None:
    """With the same global batch, 2 and 4 ranks train as one process does."""
    config: dict[str, Any] = {"batch": {"accumulation": accumulation}, "optimizer": {"lr": 1e-3}}
    if clip:
        config["optimizer"]["clip"] = clip
    theirs = plain.plain_loop(STEPS, clip=clip)
    results = ranks(world, train, config)
    for mine in results:
        assert plain.difference(mine["params"], theirs["params"]) <= 1e-6
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
        assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
        assert plain.same_bits(mine["params"], results[0]["params"])


@pytest.mark.parametrize("how", ["iterator", "finer", "loss.backward", "no_sync", "all in no_sync"])
@pytest.mark.parametrize("world", [1, 2])
def test_every_way_to_call_is_the_same(ranks: Any, world: int, how: str) -> None:
    """Iterators, the finer calls, plain backward and no_sync give train_step's bits."""
    config = {"batch": {"accumulation": 3}, "optimizer": {"lr": 1e-3, "clip": 0.05}}
    expected = ranks(world, train, config)
    for mine, theirs in zip(ranks(world, train, config, STEPS, how), expected, strict=True):
        assert plain.same_bits(mine["params"], theirs["params"])
        assert mine["norms"] == theirs["norms"]
        assert mine["step"] == STEPS


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        ("adam", torch.optim.Adam, {"lr": 1e-3, "amsgrad": True}),
        ("adagrad", torch.optim.Adagrad, {"lr": 1e-2}),
        ("rmsprop", torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
        ("nadam", torch.optim.NAdam, {"lr": 1e-3}),
        ("radam", torch.optim.RAdam, {"lr": 1e-3}),
        ("adamax", torch.optim.Adamax, {"lr": 1e-3}),
        ("torch.optim.Adadelta", torch.optim.Adadelta, {"lr": 0.5, "rho": 0.8}),
    ],
)
def test_optimizers_are_torchs_own(name: str, kind: Any, options: dict[str, Any]) -> None:
    """Each optimizer by name or dotted path takes its options and updates as torch's does."""
    mine = train({"optimizer": {"name": name, **options}})
    assert plain.same_bits(mine["params"], plain.plain_loop(STEPS, optimizer=kind, options=options)["params"])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_autocast_is_torchs_autocast(ranks: Any, world: int, compute: str) -> None:
    """With autocast the model keeps fp32 parameters and the forward pass is torch.autocast's."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[compute]
    table = {"compute": compute, "autocast": True, "loss_scale": 1.0}
    results = ranks(world, train, {"precision": table, "optimizer": {"lr": 1e-3}})
    # In 8 or 11 bits halves of a batch round otherwise than the whole, and two threads otherwise than one.
    (theirs,) = ranks(1, plain.plain_loop, STEPS, pieces=world, autocast=dtype)
    for mine in results:
        if world == 1:
            assert plain.same_bits(mine["params"], theirs["params"])
        # A last bit of an fp32 sum may tip the rounding of an activation.
        assert plain.difference(mine["params"], theirs["params"]) <= 5e-4


def low_precision_loop(dtype: torch.dtype, pieces: int, scale: float) -> dict[str, torch.Tensor]:
    """The plain loop with fp32 master weights, fp32 accumulation and a loss scale."""
    model = plain.make_model()
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    model.to(dtype)
    update = torch.optim.AdamW(masters, lr=1e-3)
    batch = plain.make_data()
    for _ in range(STEPS):
        for master in masters:
            master.grad = torch.zeros_like(master)
        for index in range(pieces):
            inputs, targets = plain.piece(batch, index, pieces)
            loss = nn.functional.cross_entropy(model(inputs.to(dtype)), targets)
            grads = torch.autograd.grad(loss, list(model.parameters()), torch.tensor(scale / pieces, dtype=dtype))
            for master, grad in zip(masters, grads, strict=True):
                assert master.grad is not None
                master.grad += grad.float()
        for master in masters:
            assert master.grad is not None
            master.grad *= 1 / scale
        update.step()
        with torch.no_grad():
            for param, master in zip(model.parameters(), masters, strict=True):
                param.copy_(master)
    return {name: master.detach() for (name, _), master in zip(model.named_parameters(), masters, strict=True)}


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize(("compute", "scale"), [("bf16", 1.0), ("fp16", 1024.0)])
def test_low_precision_keeps_fp32_masters(compute: str, scale: float, pieces: int) -> None:
    """bf16 and fp16 compute update fp32 masters from fp32 sums, bit for bit as written out by hand."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[compute]
    table = {"compute": compute, "loss_scale": scale}
    mine = train({"precision": table, "batch": {"accumulation": pieces}, "optimizer": {"lr": 1e-3}})
    assert mine["skipped"] == 0
    assert plain.same_bits(mine["params"], low_precision_loop(dtype, pieces, scale))


@pytest.mark.parametrize(("compute", "pieces"), [("bf16", 2), ("fp16", 1)])
def test_low_precision_over_ranks(ranks: Any, compute: str, pieces: int) -> None:
    """Two ranks in low precision stay with one process to that precision, and with each other exactly."""
    config = {"precision": {"compute": compute}, "optimizer": {"lr": 1e-3}}
    # bf16 rounds the whole batch otherwise than its halves, so one process takes the ranks' halves one after the
    # other; fp16 has the digits, but not the range: halved losses would lose small gradients.
    alone = train({**config, "batch": {"accumulation": pieces}})
    results = ranks(2, train, config)
    assert plain.same_bits(results[0]["params"], results[1]["params"])
    assert plain.difference(results[0]["params"], alone["params"]) <= 2e-3


def test_schedule_is_the_closed_form() -> None:
    """A cosine schedule with warm-up trains as a LambdaLR with the same formula."""
    from math import cos, pi

    def factor(step: int) -> float:
        return (step + 1) / 3 if step < 3 else 0.1 + 0.9 * (1 + cos(pi * (step - 3) / 9)) / 2

    table = {"name": "cosine", "steps": 12, "warmup": 3, "final": 0.1}
    mine = train({"scheduler": table, "optimizer": {"lr": 1e-3}})
    theirs = plain.plain_loop(STEPS, schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, factor))
    assert plain.difference(mine["params"], theirs["params"]) <= 1e-7
