"""Several engines in one process, precisions, and what a freed parameter says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import company
import pytest
import sharded
import threads
import torch
from torch import nn

import powertrain
from powertrain.errors import ParameterFreed

FULL = [0, 1, 2, 3]


def teacher_of(**kwargs: Any) -> nn.Module:
    torch.manual_seed(77)
    return company.Stack(**kwargs)


def distil(batches: list[list[Any]], stages: list[int]) -> list[sharded.Slices]:
    """Train a student towards a teacher, each with an engine of its own; run on every rank."""
    teacher = company.start(teacher_of, company.config(stages[0]))
    student = company.start(company.make_stack, company.config(stages[1]))
    with teacher, student:
        for micros in batches:
            ((x, order, _),) = company.mine(student, micros)
            with torch.no_grad():
                target = teacher((x, order))
            nn.functional.mse_loss(student((x, order)), target).backward()
            student.step()
        return [sharded.slices(engine) for engine in (teacher, student)]


@pytest.mark.parametrize("stages", [[3, 1], [3, 3], [1, 3]], ids=str)
def test_a_teacher_and_a_student(stages: list[int]) -> None:
    """Two engines live in one process: a teacher that is only asked, and a student that learns; equal to plain."""
    batches = [company.stack_micros([FULL, [0, 2, 3]])] * company.STEPS
    teacher, student = teacher_of(), company.make_stack()
    optimizer = torch.optim.AdamW(student.parameters(), **company.OPTIONS)
    for micros in batches:
        optimizer.zero_grad()
        for x, order, _ in micros:
            with torch.no_grad():
                target = teacher(x, order)
            (nn.functional.mse_loss(student(x, order), target) / 2).backward()
        optimizer.step()
    results = threads.run(2, distil, batches, stages)
    company.equal(
        [result[0] for result in results], {n: p.detach() for n, p in teacher.named_parameters()}, tolerance=0.0
    )
    company.equal([result[1] for result in results], {n: p.detach() for n, p in student.named_parameters()})


PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"compute": "bf16"},
    "fp16": {"compute": "fp16", "loss_scale": 1024.0},
    "autocast bf16": {"compute": "bf16", "autocast": True},
    "autocast fp16": {"compute": "fp16", "autocast": True, "loss_scale": 1024.0},
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_precisions(name: str) -> None:
    """Low precision and autocast, with a loss scale, train as replicated ranks do, at every stage."""
    batches = [company.stack_micros([FULL, FULL])] * 4
    table = {"precision": PRECISIONS[name]}
    cases = [(batches, company.config(stage, **table), {}) for stage in (0, 1, 2, 3)]
    replicated, *rest = zip(*threads.run(2, company.train_many, company.make_stack, cases), strict=True)
    for parts in rest:
        # The sum of two rounded gradients may round once more; a last bit may tip an activation.
        company.equal(parts, sharded.parameters(replicated), tolerance=5e-4)


def touches(stage: int) -> dict[str, str]:
    """Do to freed parameters what programs do; run on every rank."""
    facts = {n: (p.shape, p.numel(), p.requires_grad, p.dtype) for n, p in company.Stack().named_parameters()}
    said: dict[str, str] = {}
    with company.start(company.make_stack, company.config(stage), nn.functional.cross_entropy) as engine:
        model: Any = engine.module
        weight = model.blocks[0].mlp.inner.weight

        def decay() -> None:
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(0.9)

        attempts: dict[str, Callable[[], Any]] = {
            "sum": lambda: weight.sum(),
            "loop": decay,
            "state_dict": model.state_dict,
            "deepcopy": lambda: copy.deepcopy(model),
            "data": lambda: weight.data,
            "item": lambda: weight[0, 0].item(),
            "tolist": weight.tolist,
            "numpy": lambda: weight.detach().numpy(),
            "functional": lambda: nn.functional.linear(torch.zeros(1, company.WIDTH), weight),
            "operator": lambda: weight + 1,
            "init": lambda: nn.init.zeros_(weight),
            "data_ptr": weight.data_ptr,
            "type": lambda: weight.type(torch.bfloat16),
            "module": lambda: model.blocks[0].mlp.inner(torch.zeros(1, company.WIDTH)),
            "vector": lambda: nn.utils.parameters_to_vector(model.parameters()),
            "load": lambda: model.load_state_dict({name: torch.zeros(shape) for name, (shape, *_) in facts.items()}),
            "optimizer": lambda: torch.optim.SGD(model.parameters(), lr=1.0).step(),
        }
        for moment in ("new", "trained"):
            for name, attempt in attempts.items():
                try:
                    attempt()
                except (ParameterFreed, RuntimeError) as error:  # torch wraps what it meets while loading
                    said[f"{name} {moment}"] = str(error)
                else:
                    said[f"{name} {moment}"] = "nothing"
            assert {n: (p.shape, p.numel(), p.requires_grad, p.dtype) for n, p in model.named_parameters()} == facts
            assert sum(p.numel() for p in model.parameters()) == sum(numel for _, numel, _, _ in facts.values())
            assert all(p.is_leaf and p.grad is None and p.device.type == "cpu" for p in model.parameters())
            assert len(weight) == weight.size(0) == weight.shape[0]
            assert weight.ndim == weight.dim() == 2
            assert weight.type() == "torch.FloatTensor"
            assert weight.stride() == (company.WIDTH, 1)
            assert "blocks.0.mlp.inner.weight" in repr(weight)
            assert isinstance(weight, nn.Parameter)
            assert {weight: 1}[weight] == 1
            model.zero_grad()
            model.train()
            model.eval()
            model.requires_grad_(True)
            str(model)
            (micro,) = company.mine(engine, company.stack_micros([FULL, FULL]))
            engine.train_step(iter([micro]))
        with powertrain.full(engine):
            assert float(weight.detach().abs().sum()) > 0
            assert len(model.state_dict()) == len(facts)
    return said


def test_what_a_freed_parameter_says() -> None:
    """Touching a parameter that rests in pieces is an error with its name; what needs no elements works."""
    for said in threads.run(2, touches, 3):
        silent = [name for name, words in said.items() if words == "nothing" and not name.startswith("optimizer")]
        assert not silent
        for name, words in said.items():
            if name.startswith("optimizer"):
                continue  # without gradients an optimizer touches nothing
            assert "blocks.0." in words or "first.weight" in words, f"{name}: {words}"
            assert "powertrain.full" in words


@pytest.mark.parametrize(("stage", "zero"), [(1, {}), (2, {}), (3, {}), (3, {"reshard_after_forward": False})], ids=str)
@pytest.mark.parametrize("inside", [True, False])
def test_gradients_of_gradients(stage: int, zero: dict[str, Any], inside: bool) -> None:
    """Forces, penalties: a loss may hold gradients that autograd took within the model's forward or after it."""
    micros = [(x, y) for x, _, y in company.stack_micros([FULL, FULL])]
    theirs = company.plain_loop(company.make_forces, [micros] * 3, company.Forces.loss_of, inside=inside)
    cases = [([micros] * 3, company.config(stage, zero=zero), {"inside": inside})]
    for parts in zip(
        *threads.run(2, company.train_many, company.make_forces, cases, company.Forces.loss_of), strict=True
    ):
        company.equal(parts, theirs)
