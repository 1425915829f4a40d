"""The processor's kernels beside torch's optimizers; sizes, threads, processes, and what they refuse."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch

from powertrain import kernels
from powertrain.kernels.blockwise import Blockwise
from powertrain.kernels.updates import Operands
from powertrain.roles.communicator import Reduction
from powertrain_cpu.accelerator import CpuAccelerator
from powertrain_cpu.kernels import FORMATS, CpuKernels
from powertrain_cpu.source import KERNELS

pytestmark = pytest.mark.timeout(600)  # the first test of a machine waits for the build

STEPS = 6
COUNTS = (1, 33, 1024, 5000)
BETAS = {"beta1": 0.9, "beta2": 0.99}


def randoms(*counts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return one tensor of normal numbers for each count."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=generator).to(dtype) for count in counts]


def zeros(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(count, dtype=dtype) for count in COUNTS]


# --- torch's own optimizers in float64 ---------------------------------------------------


Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def adam(own: CpuKernels, operands: Operands, step: int, **numbers: Any) -> None:
    own.adam(operands, step=step, lr=0.01, eps=1e-8, **BETAS, **numbers)


def momentum(own: CpuKernels, operands: Operands, step: int, **numbers: Any) -> None:
    own.momentum(operands, lr=0.1, weight_decay=0.05, first_time=step == 1, **numbers)


def adagrad(own: CpuKernels, operands: Operands, step: int, scale: float) -> None:
    own.adagrad(operands, step=step, lr=0.05, lr_decay=0.01, eps=1e-10, weight_decay=0.05, scale=scale)


RULES: dict[str, tuple[Make, Callable[..., None], dict[str, Any]]] = {
    "adam": (
        lambda p: torch.optim.Adam(p, 0.01, betas=(0.9, 0.99), weight_decay=0.05),
        adam,
        {"weight_decay": 0.05, "decoupled": False},
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, 0.01, betas=(0.9, 0.99), weight_decay=0.05),
        adam,
        {"weight_decay": 0.05, "decoupled": True},
    ),
    "adagrad": (
        lambda p: torch.optim.Adagrad(p, 0.05, lr_decay=0.01, weight_decay=0.05),
        adagrad,
        {},
    ),
    "sgd": (
        lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.05),
        momentum,
        {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
    ),
    "momentum": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3, weight_decay=0.05),
        momentum,
        {"momentum": 0.9, "dampening": 0.3, "nesterov": False},
    ),
    "nesterov": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
        momentum,
        {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_updates_are_torchs(own: CpuKernels, rule: str) -> None:
    """Several steps end where torch's own optimizer in float64 does, gradients scaled on the way."""
    make, update, numbers = RULES[rule]
    params = randoms(*COUNTS)
    theirs = [torch.nn.Parameter(param.double()) for param in params]
    optimizer = make(theirs)
    firsts = [] if rule == "sgd" else [torch.full_like(param, math.nan) for param in params]
    if rule not in ("momentum", "nesterov"):  # their first step does not look at what is there
        firsts = [first.zero_() for first in firsts]
    seconds = zeros() if rule.startswith("adam") else []
    for step in range(1, STEPS + 1):
        grads = randoms(*COUNTS, seed=step)
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.double() / 8
        optimizer.step()
        update(own, Operands(params, grads, firsts, seconds), step, scale=1 / 8, **numbers)
    for found, expected in zip(params, theirs, strict=True):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_lion_is_the_papers(own: CpuKernels) -> None:
    """Lion moves by the sign of the blend, then lets its momentum follow; decay is decoupled."""
    params, moments = randoms(*COUNTS), zeros()
    true = [(param.double(), moment.double()) for param, moment in zip(params, moments, strict=True)]
    for step in range(STEPS):
        grads = randoms(*COUNTS, seed=step + 1)
        own.lion(Operands(params, grads, moments), lr=0.01, weight_decay=0.1, **BETAS)
        for (param, moment), grad in zip(true, grads, strict=True):
            param.mul_(1 - 0.01 * 0.1).sub_(0.01 * (0.9 * moment + 0.1 * grad.double()).sign())
            moment.mul_(0.99).add_(0.01 * grad.double())
    for found, moment, (expected, followed) in zip(params, moments, true, strict=True):
        torch.testing.assert_close(moment.double(), followed, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_lamb_is_the_papers(own: CpuKernels) -> None:
    """LAMB goes in Adam's direction, as far as the parameter's norm over that of the direction says."""
    params, firsts, seconds = randoms(*COUNTS), zeros(), zeros()
    numbers: dict[str, Any] = {**BETAS, "eps": 1e-6, "weight_decay": 0.02}
    true = [tuple(t.double() for t in row) for row in zip(params, firsts, seconds, strict=True)]
    for step in range(1, STEPS + 1):
        grads = randoms(*COUNTS, seed=step)
        operands = Operands(params, grads, firsts, seconds)
        sums = own.lamb_moments(operands, step=step, **numbers)
        own.lamb_apply(operands, rates=0.01 * (sums[:, 0] / sums[:, 1]).sqrt(), step=step, **numbers)
        for (p, m, v), grad in zip(true, grads, strict=True):
            m.mul_(0.9).add_(0.1 * grad.double())
            v.mul_(0.99).add_(0.01 * grad.double() ** 2)
            way = m / (1 - 0.9**step) / ((v / (1 - 0.99**step)).sqrt() + 1e-6) + 0.02 * p
            p.sub_(0.01 * p.norm() / way.norm() * way)
    for found, (expected, _, _) in zip(params, true, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_new_values_in_the_models_format(own: CpuKernels, dtype: torch.dtype) -> None:
    """``outs`` are the new parameters, rounded as torch rounds them, infinities and NaN among them."""
    params = randoms(3000)
    params[0][5:9] = torch.tensor([math.inf, -math.inf, math.nan, 3e38])
    outs = [torch.zeros(3000, dtype=dtype)]
    operands = Operands(params, randoms(3000, seed=1, dtype=dtype), [torch.zeros(3000)], [torch.zeros(3000)], outs)
    adam(own, operands, 1, weight_decay=0.0, decoupled=True)
    assert torch.equal(outs[0].nan_to_num(1.5), params[0].to(dtype).nan_to_num(1.5))


# --- sizes and formats ---------------------------------------------------------------------


def updates(own: CpuKernels, operands: Operands) -> list[torch.Tensor]:
    """Run every update on copies of the operands, and return all that came out."""
    results: list[torch.Tensor] = []
    numbers: dict[str, Any] = {**BETAS, "eps": 1e-8, "weight_decay": 0.1}

    def copied() -> Operands:
        copies = copy.deepcopy(operands)
        for part in ("params", "firsts", "seconds", "outs"):
            results.extend(getattr(copies, part))
        return copies

    own.adam(copied(), step=3, lr=0.1, decoupled=True, **numbers)
    own.lion(copied(), lr=0.1, weight_decay=0.1, **BETAS)
    own.adagrad(copied(), step=3, lr=0.1, lr_decay=0.1, eps=1e-8, weight_decay=0.1)
    momentum(own, copied(), 2, momentum=0.9, dampening=0.1, nesterov=True)
    lamb = copied()
    sums = own.lamb_moments(lamb, step=3, **numbers)
    own.lamb_apply(lamb, rates=sums[:, 0], step=3, **numbers)
    return [*results, sums]


def operands_of(*counts: int) -> Operands:
    """Return random operands, squares where a rule takes roots."""
    lists = [randoms(*counts, seed=seed) for seed in range(4)]
    for tensors in lists[2:]:
        for tensor in tensors:
            tensor.square_()
    return Operands(*lists, [torch.zeros(count, dtype=torch.bfloat16) for count in counts])


def test_nothing_is_no_problem(own: CpuKernels) -> None:
    """No tensor, and tensors without an element, are updated, added up, combined and quantized in silence."""
    assert updates(own, Operands([], []))[-1].shape == (0, 2)
    *_, sums = updates(own, operands_of(0, 3, 0))
    assert bool(sums[[0, 2]].eq(0).all())
    assert bool(sums[1].gt(0).all())
    assert own.sums_of_squares([]).shape == (0,)
    assert own.sums_of_squares([torch.zeros(0), torch.ones(3)]).tolist() == [0.0, 3.0]
    nothing = torch.zeros(0)
    own.combine(nothing, [nothing, nothing])
    own.quantize(nothing, nothing.byte(), nothing, bits=8, block=256)
    own.dequantize(nothing.byte(), nothing, nothing, bits=4, block=256)


def test_many_tensors_are_as_one(own: CpuKernels) -> None:
    """Where one tensor ends and the next begins makes no difference to any element."""
    whole = operands_of(40_000)
    cuts = [1, 0, 999, 15_000, 24_000]
    lists = [whole.params, whole.grads, whole.firsts, whole.seconds, whole.outs]
    pieces = Operands(*([part.clone() for part in tensor.split(cuts)] for (tensor,) in lists))
    for operands in (whole, pieces):
        adam(own, operands, 2, weight_decay=0.1, decoupled=False)
    for name in ("params", "firsts", "seconds", "outs"):
        assert torch.equal(torch.cat(getattr(pieces, name)), getattr(whole, name)[0])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_type_is_combined_as_the_reference_does(own: CpuKernels, dtype: torch.dtype) -> None:
    """Bit for bit, whatever the type and however many terms, and where the result lies on a term."""
    reductions = [how for how in get_args(Reduction) if dtype.is_floating_point or how != "mean"]
    for how, ways in itertools.product(reductions, (1, 2, 4)):
        terms = [(term * 40).to(dtype) for term in randoms(*[3001] * ways)]
        expected, found = torch.empty(3001, dtype=dtype), torch.empty(3001, dtype=dtype)
        kernels.reference("combine")(expected, terms, how)
        own.combine(found, terms, how)
        assert torch.equal(found, expected)
        own.combine(terms[-1], terms, how)
        assert torch.equal(terms[-1], expected)


def test_sums_of_types_that_c_does_not_know(own: CpuKernels) -> None:
    """Tensors of several types in one call each get their own sum, in their place."""
    tensors = [torch.full((9,), 2.0, dtype=dtype) for dtype in (torch.float64, torch.bfloat16, torch.float32)]
    assert own.sums_of_squares([*tensors, torch.ones(2, dtype=torch.bfloat16)]).tolist() == [36.0, 36.0, 36.0, 2.0]


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_bytes_are_the_references(own: CpuKernels, bits: Any) -> None:
    """``Blockwise`` with these kernels makes the same bytes, and the same numbers of them; large blocks as well."""
    for block in (8, 256, 1024, 4096):
        codec, plain = Blockwise(bits, block, own.quantize, own.dequantize), Blockwise(bits, block)
        elements = randoms(3 * 8192)[0].view(3, 8192)
        elements[1, 77] = math.inf
        rows = codec.encode(elements)
        assert torch.equal(rows, plain.encode(elements))
        found, expected = torch.ones(2, 3, 8192).unbind(0)
        codec.accumulate(rows, found)
        plain.accumulate(rows, expected)
        assert torch.equal(found.nan_to_num(1.5), expected.nan_to_num(1.5))


# --- threads and processes -------------------------------------------------------------------


@pytest.fixture
def threads() -> Any:
    """Set the number of threads, and set it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_change_no_bit(own: CpuKernels, threads: Callable[[int], None]) -> None:
    """Every result is the same with one thread as with several."""
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        operands = operands_of(70_001, 3, 200_000)
        values, data, scales = randoms(1 << 18)[0], torch.zeros(1 << 18, dtype=torch.uint8), torch.zeros(1 << 10)
        own.quantize(values, data, scales, bits=8, block=256)
        back, total = torch.empty(1 << 18), torch.empty(1 << 18)
        own.dequantize(data, scales, back, bits=8, block=256)
        own.combine(total, [values, back, back])
        sums = own.sums_of_squares([*operands.params, values.bfloat16()])
        results.append([*updates(own, operands), data, scales, back, total, sums])
    for others in results[1:]:
        for first, other in zip(results[0], others, strict=True):
            assert torch.equal(first, other)


def test_callers_may_be_threads(own: CpuKernels, threads: Callable[[int], None]) -> None:
    """Several Python threads call kernels at once, and each gets its own result."""
    threads(3)
    tensors = randoms(*[100_000] * 4)
    expected = [float(own.sums_of_squares([tensor])[0]) for tensor in tensors]
    wrong: list[float] = []

    def call(index: int) -> None:
        found = {float(own.sums_of_squares([tensors[index]])[0]) for _ in range(20)}
        wrong.extend(found - {expected[index]})

    callers = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
        assert not caller.is_alive()
    assert not wrong


FORK = """
import os, threading, torch
from powertrain_cpu.accelerator import CpuAccelerator
torch.set_num_threads(3)
sums = CpuAccelerator().kernel("sums_of_squares")
assert sums.__self__.path
values = torch.ones(300_000)
busy = threading.Thread(target=lambda: [sums([values]) for _ in range(300)])
busy.start()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if float(sums([values])[0]) == 300_000 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
busy.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_computes(module: ModuleType) -> None:
    """Children that are forked while the threads of their parent are at work have threads of their own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr


# --- what is refused --------------------------------------------------------------------------


def given(**changes: list[torch.Tensor]) -> Operands:
    lists = {name: [torch.ones(8)] for name in ("params", "grads", "firsts", "seconds")}
    return Operands(**{**lists, **changes})


WRONG = {
    "another device": given(params=[torch.ones(8, device="meta")]),
    "not contiguous": given(params=[torch.ones(8, 2)[:, 0]]),
    "another length": given(grads=[torch.ones(9)]),
    "one too few": given(grads=[]),
    "no second moment": given(seconds=[]),
    "no first moment": given(firsts=[]),
    "two types": Operands(*[[torch.ones(8), torch.ones(8).double()]] * 4),
    "another type": given(params=[torch.ones(8, dtype=torch.int32)]),
    "moments of two types": given(seconds=[torch.ones(8).bfloat16()]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_operands_are_refused(own: CpuKernels, wrong: str) -> None:
    """C++ gets no address of a tensor that it would misread."""
    with pytest.raises(ValueError):
        adam(own, WRONG[wrong], 1, weight_decay=0.0, decoupled=True)


def test_wrong_rates_and_terms_are_refused(own: CpuKernels) -> None:
    """One rate a parameter; terms of one type and length."""
    numbers = {**BETAS, "step": 1, "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="2 rates for 1 parameters"):
        own.lamb_apply(given(), rates=torch.ones(2), **numbers)
    for term in (torch.ones(9), torch.ones(8).double()):
        with pytest.raises(ValueError, match="terms differ"):
            own.combine(torch.ones(8), [torch.ones(8), term])
    with pytest.raises(ValueError, match="not on meta"):
        own.combine(torch.ones(8, device="meta"), [torch.ones(8)] * 2)


@pytest.mark.parametrize(
    ("values", "data", "scales", "bits", "block"),
    [
        (300, 300, 1, 8, 256),
        (256, 255, 1, 8, 256),
        (256, 256, 2, 8, 256),
        (256, 256, 1, 4, 256),
        (256, 256, 1, 2, 256),
        (256, 256, 21, 8, 12),
        (256, 256, 0, 8, 0),
    ],
)
def test_blocks_that_do_not_fit_are_refused(
    own: CpuKernels, values: int, data: int, scales: int, bits: int, block: int
) -> None:
    """Bytes and scales must be those of the elements, in both directions."""
    elements, room, factors = torch.ones(values), torch.zeros(data, dtype=torch.uint8), torch.ones(scales)
    with pytest.raises(ValueError):
        own.quantize(elements, room, factors, bits=bits, block=block)
    with pytest.raises(ValueError):
        own.dequantize(room, factors, elements, bits=bits, block=block)


def test_scales_of_another_type_are_refused(own: CpuKernels) -> None:
    """Scales are fp32 and the elements bytes."""
    good = (torch.ones(256), torch.zeros(256, dtype=torch.uint8), torch.ones(1))
    for wrong in ((good[0], good[1], good[2].double()), (good[0], good[1].float(), good[2])):
        with pytest.raises(ValueError):
            own.quantize(*wrong, bits=8, block=256)


# --- how they are found ------------------------------------------------------------------------


def test_the_accelerator_has_them(module: ModuleType) -> None:
    """Each kernel is there under its name, on the widest path; what has another name is declined."""
    accelerator = CpuAccelerator()
    assert "kernels" in accelerator.capabilities
    assert set(KERNELS) == {name for name, place in kernels.NAMES.items() if place != "layers"}
    assert accelerator.kernel("rms_norm") is None  # layers are left to the reference
    for name in KERNELS:
        kernel = kernels.kernel(accelerator, name)
        assert kernel == accelerator.kernel(name) != kernels.reference(name)
        assert kernel.__self__.path == CpuKernels(module).path
    assert accelerator.kernel("get") is accelerator.kernel("no such kernel") is None
    with pytest.raises(KeyError):
        kernels.kernel(accelerator, "no such kernel")


def test_without_them_the_reference_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where they cannot be had the reference answers, and one line says so, however many kernels are asked for."""
    monkeypatch.setenv("POWERTRAIN_NATIVE", "0")
    accelerator = CpuAccelerator()
    with caplog.at_level(logging.INFO, "powertrain.native"):
        for name in KERNELS:
            assert kernels.kernel(accelerator, name) is kernels.reference(name)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "powertrain.native"]
    assert "the PyTorch reference runs instead" in line


def test_no_path_that_is_not_there(module: ModuleType) -> None:
    """A path that the processor lacks is refused, and one with another name is an error."""
    with pytest.raises(ValueError):
        CpuKernels(module, "mmx")


def test_the_build_knows_nothing_of_torch(module: ModuleType) -> None:
    """The module asks the loader for no library of torch."""
    content = Path(module.__file__ or "").read_bytes()
    assert b"libtorch" not in content
    assert b"libc10" not in content
