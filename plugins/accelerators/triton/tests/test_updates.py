"""Optimizer updates against a float64 computation and the PyTorch reference, over many random tensors at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import assert_as_exact

from powertrain.kernels import reference
from powertrain.kernels.updates import Operands
from powertrain_triton import table
from powertrain_triton.updates import Kernels

updates = Kernels(table.Tables())

F, B, H = torch.float32, torch.bfloat16, torch.float16
LENGTHS = (1, 1023, 16, 1024, 129, 2060, 0)
KINDS = ("plain", "spread", "tiny", "huge", "odd")
LISTS = ("params", "grads", "firsts", "seconds", "outs")
FORMATS = [(F, F, F, None), (F, B, F, B), (B, B, B, None), (F, H, F, H), (F, F, B, B), (H, F, F, F)]
"""Of parameters, gradients, state and outs."""

Exact = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def values(generator: torch.Generator, kind: str, count: int) -> torch.Tensor:
    """Return random numbers of all sizes, or of one kind of extremes."""
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    spread = torch.rand(count, generator=generator, dtype=torch.float64)
    if kind == "spread":
        return x * 10 ** (spread * 12 - 8)
    if kind == "tiny":
        return x * 2.0**-135
    if kind == "huge":
        return x * 2.0**66
    if kind == "odd":
        odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.0, 3e38])
        return torch.where(spread < 0.5, odd[torch.randint(len(odd), (count,), generator=generator)].double(), x)
    return x


def operands(seed: int, formats: tuple[Any, ...], device: torch.device) -> Operands:
    """Return cases: tensors of several lengths, alignments and kinds of values."""
    generator = torch.Generator().manual_seed(seed)
    lists: dict[str, list[torch.Tensor]] = {name: [] for name in LISTS}
    param, grad, state, out = formats
    kinds = dict(zip(LISTS, (param, grad, state, state, out), strict=True))
    cases = [(length, kind) for kind in KINDS for length in LENGTHS[seed % 2 :: 2]]
    for length, kind in cases:
        for name, dtype in kinds.items():
            if dtype is None:
                continue
            shift = int(torch.randint(4, (), generator=generator)) if length % 5 else 0
            room = torch.zeros(length + shift, dtype=dtype, device=device)
            x = values(generator, kind, length)
            room[shift:] = (x.abs() if name in ("firsts", "seconds") else x).to(dtype)
            lists[name].append(room[shift:])
    return Operands(**lists)


def joined(given: Operands, name: str, start: int, count: int) -> torch.Tensor:
    """Return some tensors of a list as one; nothing of an empty list."""
    return torch.cat(list(getattr(given, name)[start : start + count]) or [torch.zeros(0)])


def copied(given: Operands) -> Operands:
    return Operands(**{name: [x.clone() for x in getattr(given, name)] for name in LISTS})


def without(given: Operands, *names: str) -> Operands:
    return Operands(**{name: () if name in names else getattr(given, name) for name in LISTS})


def bias(step: int, beta1: float, beta2: float) -> tuple[float, float]:
    return 1 - beta1**step, math.sqrt(1 - beta2**step)


def adam(p: Any, g: Any, m: Any, v: Any, o: dict[str, Any]) -> Exact:
    decay = o["weight_decay"]
    if decay and o["decoupled"]:
        p = p * (1 - o["lr"] * decay)
    elif decay:
        g = g + decay * p
    m, v = o["beta1"] * m + (1 - o["beta1"]) * g, o["beta2"] * v + (1 - o["beta2"]) * g * g
    bias1, bias2 = bias(o["step"], o["beta1"], o["beta2"])
    return p - o["lr"] / bias1 * m / (v.sqrt() / bias2 + o["eps"]), m, v


def lion(p: Any, g: Any, m: Any, v: Any, o: dict[str, Any]) -> Exact:
    p = p * (1 - o["lr"] * o["weight_decay"]) if o["weight_decay"] else p
    blend = o["beta1"] * m + (1 - o["beta1"]) * g
    return p - o["lr"] * blend.sign(), o["beta2"] * m + (1 - o["beta2"]) * g, None


def adagrad(p: Any, g: Any, m: Any, v: Any, o: dict[str, Any]) -> Exact:
    g = g + o["weight_decay"] * p if o["weight_decay"] else g
    m = m + g * g
    return p - o["lr"] / (1 + (o["step"] - 1) * o["lr_decay"]) * g / (m.sqrt() + o["eps"]), m, None


def momentum(p: Any, g: Any, m: Any, v: Any, o: dict[str, Any]) -> Exact:
    g = g + o["weight_decay"] * p if o["weight_decay"] else g
    if m is not None:
        m = g if o["first_time"] else o["momentum"] * m + (1 - o["dampening"]) * g
        g = g + o["momentum"] * m if o["nesterov"] else m
    return p - o["lr"] * g, m, None


ADAM = {"step": 3, "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True}
LION = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
ADAGRAD = {"step": 5, "lr": 1e-2, "lr_decay": 0.01, "eps": 1e-10, "weight_decay": 0.1}
MOMENTUM = {
    "lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "nesterov": False, "weight_decay": 0.1, "first_time": False,
}  # fmt: skip
RULES: list[tuple[Callable[..., Exact], dict[str, Any]]] = [
    (adam, ADAM),
    (adam, {**ADAM, "decoupled": False, "beta1": 0.3}),
    (adam, {**ADAM, "weight_decay": 0.0, "step": 1000}),
    (lion, LION),
    (lion, {**LION, "weight_decay": 0.0}),
    (adagrad, ADAGRAD),
    (adagrad, {**ADAGRAD, "weight_decay": 0.0, "step": 1}),
    (momentum, MOMENTUM),
    (momentum, {**MOMENTUM, "nesterov": True, "weight_decay": 0.0}),
    (momentum, {**MOMENTUM, "first_time": True}),
]


def cancelled(*terms: torch.Tensor) -> torch.Tensor:
    """Return where less than half is left of a sum: its error is then luck, for the reference as well."""
    return sum(terms).abs() < sum(term.abs() for term in terms) / 2  # type: ignore[union-attr]


def unclear(rule: Callable[..., Exact], p: Any, g: Any, m: Any, o: dict[str, Any]) -> torch.Tensor:
    """Return where a sum on the way cancels out; the last one, with the parameter itself, is judged by its terms."""
    decay = 0.0 if o.get("decoupled", rule is lion) else o["weight_decay"]
    found = cancelled(g, decay * p) if decay else torch.zeros_like(g, dtype=torch.bool)
    if rule is momentum:
        g = g + decay * p if decay else g
        new = o["momentum"] * m + (1 - o["dampening"]) * g
        return found | cancelled(new - (1 - o["dampening"]) * g, (1 - o["dampening"]) * g) | cancelled(g, new)
    if rule in (adam, lion):
        found |= cancelled(o["beta1"] * m, (1 - o["beta1"]) * (g + decay * p if decay else g))
    return found


@pytest.mark.parametrize("formats", FORMATS, ids=lambda kinds: "-".join(str(k).removeprefix("torch.") for k in kinds))
def test_updates_are_as_exact_as_the_reference(formats: Any, device: torch.device, rounds: int) -> None:
    """For tensors of every length, alignment and value, all rules are within twice the reference's error and an ulp."""
    for number in range(rounds):
        for index, (rule, options) in enumerate(RULES):
            given = operands(number * len(RULES) + index + FORMATS.index(formats), formats, device)
            given = without(given, *(() if rule is adam else ("seconds",)))
            scale = 0.37 if index % 2 else torch.tensor(0.37, device=device)
            mine, theirs = copied(given), copied(given)
            getattr(updates, rule.__name__)(mine, **options, scale=scale)
            reference(rule.__name__)(theirs, **options, scale=scale)
            # One kind of values at a time: the reference's worst error of a handful of numbers would be luck.
            each = len(given.params) // len(KINDS)
            for kind, start in zip(KINDS, range(0, len(given.params), each), strict=True):
                before, own, other = (
                    {name: joined(side, name, start, each) for name in LISTS} for side in (given, mine, theirs)
                )
                p, g, m, v = (before[name].double() for name in LISTS[:4])
                exact = rule(p, g * 0.37, m, v, options)
                judged = ~unclear(rule, p, g * 0.37, m, options)
                terms = {"params": p, "outs": p, "firsts": torch.maximum(g.abs(), m.abs())}
                for name, result in zip(("params", "firsts", "seconds", "outs"), (*exact, exact[0]), strict=True):
                    if getattr(given, name):
                        beside = terms[name][judged] if name in terms else None
                        what = f"{rule.__name__} {options}, {name}, {kind}"
                        assert_as_exact(own[name][judged], other[name][judged], result[judged], what, beside)
                assert torch.equal(own["grads"].nan_to_num(), before["grads"].nan_to_num())


def test_descent_without_momentum(device: torch.device) -> None:
    """Without firsts the step is the scaled gradient."""
    given = without(operands(0, (F, B, F, B), device), "firsts", "seconds")
    mine, theirs = copied(given), copied(given)
    options = {**MOMENTUM, "momentum": 0.0, "scale": 0.5}
    updates.momentum(mine, **options)
    reference("momentum")(theirs, **options)
    for row, (p, g) in enumerate(zip(given.params, given.grads, strict=True)):
        exact, *_ = momentum(p.double(), g.double() * 0.5, None, None, options)
        for name in ("params", "outs"):
            own, other = (getattr(side, name)[row] for side in (mine, theirs))
            assert_as_exact(own, other, exact, f"{name}, row {row}", torch.maximum(p.abs(), g.float().abs()).double())


@pytest.mark.parametrize("formats", [(F, B, F, B), (B, B, B, None)], ids=["mixed", "bf16"])
def test_lamb_is_as_exact_as_the_reference(formats: Any, device: torch.device) -> None:
    """Moments, sums of squares and the step."""
    shared = {"step": 4, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.01}
    given = operands(1, formats, device)
    mine, theirs = copied(given), copied(given)
    own = updates.lamb_moments(without(mine, "outs"), **shared, scale=torch.tensor(0.37, device=device))
    other = reference("lamb_moments")(without(theirs, "outs"), **shared, scale=0.37)
    assert own.shape == (len(given.params), 2)
    torch.testing.assert_close(own, other, rtol=1e-6, atol=0.0, equal_nan=True)
    for name in ("firsts", "seconds"):
        for one, two in zip(getattr(mine, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-40, equal_nan=True)
    moments, mine = copied(theirs), copied(theirs)
    rates = torch.rand(len(given.params), generator=torch.Generator().manual_seed(0)).to(device)
    updates.lamb_apply(mine, rates=rates, **shared)
    reference("lamb_apply")(theirs, rates=rates, **shared)
    bias1, bias2 = bias(4, 0.9, 0.99)
    for row, rate in enumerate(rates.double()):
        p, m, v = (getattr(moments, name)[row].double() for name in ("params", "firsts", "seconds"))
        exact = p - rate * (m / bias1 / (v.sqrt() / bias2 + 1e-6) + 0.01 * p)
        for name in ("params", "outs") if given.outs else ("params",):
            assert_as_exact(getattr(mine, name)[row], getattr(theirs, name)[row], exact, f"{name}, row {row}", p)


def test_rows_of_several_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a row of the table has several blocks, the result is the same, in programs that find nothing to do too."""
    given = operands(1, (F, F, F, None), device)
    one, several = copied(given), copied(given)
    updates.adam(one, **ADAM)
    monkeypatch.setattr(table, "ROWS", 1)
    assert table.Tables().of([given.params]).blocks > 1
    updates.adam(several, **ADAM)
    for own, other in zip(one.params, several.params, strict=True):
        assert torch.equal(own.nan_to_num(), other.nan_to_num())
    first = updates.lamb_moments(copied(given), step=1, beta1=0.9, beta2=0.9, eps=0.0, weight_decay=0.0)
    monkeypatch.setattr(table, "ROWS", 1 << 20)
    second = updates.lamb_moments(copied(given), step=1, beta1=0.9, beta2=0.9, eps=0.0, weight_decay=0.0)
    assert torch.equal(first.nan_to_num(), second.nan_to_num())


def test_no_tensors(device: torch.device) -> None:
    """Nothing to update is no error."""
    updates.adam(Operands([], []), **ADAM)
    empty = [torch.zeros(0, device=device)]
    updates.lion(Operands(empty, empty, empty), **LION)
    nothing = updates.lamb_moments(Operands([], []), step=1, beta1=0.9, beta2=0.9, eps=0.0, weight_decay=0.0)
    assert nothing.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grads": [torch.zeros(3)]}, "numbers of elements"),
        ({"params": [torch.zeros(2, 4).T]}, "contiguous"),
        ({"params": [torch.zeros(8, dtype=torch.float64)]}, "an update takes"),
        ({"params": [torch.zeros(8), torch.zeros(8).bfloat16()], "grads": [torch.zeros(8)] * 2}, "one type"),
        ({"firsts": [torch.zeros(8).bfloat16()], "seconds": [torch.zeros(8)]}, "two types"),
    ],
)
def test_what_cannot_be_updated_is_an_error(change: dict[str, Any], words: str) -> None:
    """Lists that do not belong together never reach the device."""
    lists = {"params": [torch.zeros(8)], "grads": [torch.zeros(8)], **change}
    many = len(lists["params"])
    lists = {"firsts": [torch.zeros(8)] * many, "seconds": [torch.zeros(8)] * many, **lists}
    with pytest.raises(ValueError, match=words):
        updates.adam(Operands(**lists), **ADAM)


def test_a_table_is_kept_while_the_places_are_the_same(device: torch.device) -> None:
    """The same memory has the same table, other memory another, and each owner its own."""
    tables, one, other = table.Tables(), [torch.zeros(5, device=device)], [torch.zeros(5, device=device)]
    kept = tables.of([one])
    assert tables.of([one]) is kept
    assert tables.of([other]) is not kept
    assert table.Tables().of([one]) is not kept
