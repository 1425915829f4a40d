"""The optimizers that torch has as well: the same numbers, the same state, and checkpoints that go either way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from powertrain_cpu.accelerator import CpuAccelerator
from powertrain_optimizers.adafactor import Adafactor
from powertrain_optimizers.adagrad import Adagrad
from powertrain_optimizers.adam import Adam, AdamW
from powertrain_optimizers.muon import Muon
from powertrain_optimizers.sgd import SGD

Kind = Callable[..., torch.optim.Optimizer]

PAIRS: list[tuple[Any, Any, dict[str, Any]]] = [
    (Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    (AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (AdamW, torch.optim.AdamW, {"lr": 0.01, "maximize": True}),
    (SGD, torch.optim.SGD, {"lr": 0.01, "weight_decay": 0.1}),
    (SGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.2, "maximize": True}),
    (SGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (Adagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    (Adagrad, torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5}),
    (Adafactor, torch.optim.Adafactor, {"lr": 0.05, "weight_decay": 0.1}),
    (Adafactor, torch.optim.Adafactor, {"lr": 0.05, "eps": (1e-6, 1e-2), "d": 2.0, "maximize": True}),
    (Muon, torch.optim.Muon, {"lr": 0.02, "weight_decay": 0.1}),
    (Muon, torch.optim.Muon, {"lr": 0.02, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
]
pairs = pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS, ids=lambda v: getattr(v, "__name__", None))
KERNELS = [pair for pair in PAIRS if pair[0] not in (Adafactor, Muon)]
elementwise = pytest.mark.parametrize(
    ("ours", "theirs", "options"), KERNELS, ids=lambda value: getattr(value, "__name__", None)
)


def shapes_of(kind: Any) -> list[tuple[int, ...]]:
    """Return shapes of parameters that an optimizer takes."""
    return [(7, 5), (5, 9), (300, 4)] if kind is Muon else [(7, 5), (11,), (2, 3, 4, 5), ()]


def make(kind: Any, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(4)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes_of(kind)]


def fill(params: list[nn.Parameter], step: int, skip: int = -1) -> None:
    """Give parameters the gradients of a step; one of them none."""
    generator = torch.Generator().manual_seed(100 + step)
    for number, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator)
        param.grad = None if number == skip else grad.to(param.dtype)


def run(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range = range(5)) -> None:
    """Take steps; in the second one, the first parameter has no gradient."""
    for step in steps:
        fill(params, step, skip=0 if step == 1 else -1)
        optimizer.step()


def with_kernels(optimizer: Any) -> Any:
    optimizer.accelerator = CpuAccelerator()
    return optimizer


def close(mine: Any, theirs: Any, *, bits: bool = False, tolerance: float = 2e-6) -> None:
    for one, other in zip(mine, theirs, strict=True):
        if bits:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
@pairs
def test_numbers_are_torchs(ours: Any, theirs: Any, options: dict[str, Any], kernels: bool) -> None:
    """Parameters and state after several steps, a skipped gradient included, are those of torch's class."""
    mine, other = make(ours), make(ours)
    optimizer, reference = ours(mine, **options), theirs(other, **options)
    run(mine, with_kernels(optimizer) if kernels else optimizer)
    run(other, reference)
    tolerance = 1e-2 if ours is Muon else 2e-6  # bf16 iterations round where the sums before them differ by a bit
    close(mine, other, tolerance=tolerance)
    for one, two in zip(mine, other, strict=True):
        state, expected = optimizer.state[one], reference.state[two]
        assert {key for key, value in state.items() if value is not None} == {
            key for key, value in expected.items() if value is not None
        }
        for key, value in state.items():
            assert (value.shape, value.dtype, value.device) == (
                expected[key].shape, expected[key].dtype, expected[key].device,
            ), key  # fmt: skip
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)


def test_muon_is_torchs_to_the_bit() -> None:
    """The iterations are the same operations in the same order and format: the first step gives the same bits."""
    mine, other = make(Muon), make(Muon)
    run(mine, Muon(mine, lr=0.02), range(1))
    run(other, torch.optim.Muon(other, lr=0.02), range(1))
    close(mine, other, tolerance=1e-7)


@elementwise
def test_checkpoints_go_either_way(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """A state dict of torch's class loads into ours, and back, and training goes on as if nothing had happened."""
    whole = make(ours)
    run(whole, theirs(whole, **options), range(6))
    for first, second in ((theirs, ours), (ours, theirs)):
        params = make(ours)
        before = first(params, **options)
        run(params, before, range(3))
        after = second(params, **options)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        run(params, after, range(3, 6))
        close(params, whole)


def test_what_torchs_class_can_and_ours_cannot_is_refused() -> None:
    """amsgrad, switched on in a loaded state, is an error, not left out in silence."""
    from powertrain.errors import OptimizerError

    params = make(Adam)
    before = torch.optim.Adam(params, amsgrad=True)
    run(params, before, range(2))
    after = Adam(params)
    after.load_state_dict(before.state_dict())
    fill(params, 3)
    with pytest.raises(OptimizerError, match="no amsgrad") as caught:
        after.step()
    assert caught.value.code == "PT430"
    assert "torch.optim.Adam" in str(caught.value)


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
@elementwise
def test_parameters_in_any_layout(ours: Any, theirs: Any, options: dict[str, Any], kernels: bool) -> None:
    """Channels-last weights, transposed ones and slices with gaps are updated in place, gradients in another layout."""

    def laid() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(5)
        conv = torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last)
        turned = torch.randn(6, 4, generator=generator).T
        gaps = torch.randn(8, 10, generator=generator)[:, ::2]
        result = [nn.Parameter(conv), nn.Parameter(turned), nn.Parameter(gaps)]
        assert not any(param.is_contiguous() for param in result)
        return result

    mine, other = laid(), laid()
    optimizer, reference = ours(mine, **options), theirs(other, **options)
    run(mine, with_kernels(optimizer) if kernels else optimizer)
    run(other, reference)
    close(mine, other)
    assert [param.stride() for param in mine] == [param.stride() for param in laid()]


@elementwise
def test_wide_and_complex_parameters(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """fp64 is not rounded to fp32, also where there are kernels; complex parameters are pairs of real ones."""
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.complex64, 2e-6), (torch.complex128, 1e-13)):
        mine, other = make(ours, dtype), make(ours, dtype)
        for params in (mine, other):
            if dtype.is_complex:
                for param in params:
                    param.data.mul_(1 + 0.5j)
        optimizer, reference = with_kernels(ours(mine, **options)), theirs(other, **options)
        run(mine, optimizer)
        run(other, reference)
        close(mine, other, tolerance=tolerance)


@elementwise
def test_low_precision_parameters(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """bf16 parameters are updated in fp32 and rounded once, by kernels as by the reference; moments may be bf16."""
    from_reference, from_kernels = make(ours, torch.bfloat16), make(ours, torch.bfloat16)
    run(from_reference, ours(from_reference, **options))
    run(from_kernels, with_kernels(ours(from_kernels, **options)))
    for one, other in zip(from_reference, from_kernels, strict=True):
        # An ulp, where the fp32 sums lie on two sides of a tie.
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-3)
        assert (one == other).float().mean() > 0.9
    mine, other = make(ours), make(ours)
    optimizer = ours(mine, **options)
    optimizer.state_dtype = torch.bfloat16
    run(mine, optimizer)
    run(other, theirs(other, **options))
    close(mine, other, tolerance=0.05)
    for param in mine:
        wide = {key for key, value in optimizer.state[param].items() if value.dtype != torch.bfloat16}
        assert wide <= {"step"}
    again = ours(mine, **options)
    again.state_dtype = torch.bfloat16
    again.load_state_dict(optimizer.state_dict())
    for param in mine:
        for key, value in optimizer.state[param].items():
            assert again.state[param][key].dtype == value.dtype, key


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
def test_groups_with_numbers_of_their_own(kernels: bool) -> None:
    """Each group has its rate, decays and weight decay; a rate may be a tensor; closures are evaluated."""

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[:1], "lr": torch.tensor(0.03)},
            {"params": []},
            {"params": params[1:], "weight_decay": 0.3, "betas": (0.5, 0.9)},
        ]

    mine, other = make(AdamW), make(AdamW)
    optimizer, reference = AdamW(groups(mine)), torch.optim.AdamW(groups(other), foreach=False)
    run(mine, with_kernels(optimizer) if kernels else optimizer)
    run(other, reference)
    close(mine, other)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in mine)
        loss.backward()
        return loss

    before = closure().detach()
    assert optimizer.step(closure) == before
    assert closure() < before


def test_sparse_gradients_are_made_dense() -> None:
    """An embedding's sparse gradient updates its rows as the dense one does."""
    results = []
    for sparse in (False, True):
        torch.manual_seed(2)
        embedding = nn.Embedding(10, 4, sparse=sparse)
        optimizer = AdamW(embedding.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            embedding(torch.tensor([1, 3, 3])).square().sum().backward()
            assert embedding.weight.grad.is_sparse == sparse
            optimizer.step()
        results.append(embedding.weight.detach())
    close(*[[result] for result in results], bits=True)


def test_schedulers_and_copies() -> None:
    """A scheduler of torch drives it without a warning; a copy goes on by itself."""
    params = make(AdamW)
    optimizer = AdamW(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    fill(params, 0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        fill(group["params"], 1)
    fill(params, 1)
    optimizer.step()
    twin.step()
    close(params, twin.param_groups[0]["params"], bits=True)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Adam, {"lr": -1.0}),
        (AdamW, {"betas": (0.9, 1.0)}),
        (SGD, {"nesterov": True}),
        (Adagrad, {"eps": -1.0}),
        (Adafactor, {"d": 0.5}),
        (Muon, {"ns_dtype": "fp8"}),
    ],
)
def test_impossible_numbers_are_refused(kind: Any, options: dict[str, Any]) -> None:
    """Numbers that make no sense are a ValueError, as with torch's classes."""
    with pytest.raises(ValueError, match=r"must|needs"):
        kind(make(kind), **options)
