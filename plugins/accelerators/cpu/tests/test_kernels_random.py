"""Ten thousand random cases against a float64 computation and the PyTorch reference, and faults that they catch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import attrs
import pytest
import torch

from powertrain.kernels.updates import Operands
from powertrain_cpu.kernels import CpuKernels
from powertrain_cpu.selftest import check, worst_of
from powertrain_cpu.source import KERNELS

CASES = 340
"""Of each kernel and path: 10,200 in all where there are three paths."""

pytestmark = pytest.mark.timeout(600)  # the first test of a machine waits for the build


@pytest.mark.parametrize("name", KERNELS)
def test_no_case_is_further_off_than_it_may_be(own: CpuKernels, name: str) -> None:
    """At most twice the reference's distance from float64 and one unit in the last place; quantizers bit for bit."""
    assert worst_of(own, name, range(CASES)) <= 1.0


def test_every_kernel_is_tried_on_every_path(module: ModuleType) -> None:
    """``powertrain kernels test`` tries each kernel on each path of this processor and finds it right."""
    findings = list(check(cases=2))
    assert [finding.kernel for finding in findings] == list(KERNELS) * (module.widest_path() + 1)
    assert all(finding.good for finding in findings)


class Faulty(CpuKernels):
    """The kernels, one of which is a little wrong."""


class RoundsTheRate(Faulty):
    def adam(self, operands: Operands, **numbers: Any) -> None:
        super().adam(operands, **{**numbers, "lr": numbers["lr"] * (1 + 1e-4)})


class ForgetsTheScale(Faulty):
    def lion(self, operands: Operands, **numbers: Any) -> None:
        super().lion(operands, **{**numbers, "scale": 1.0})


class ForgetsTheLastElement(Faulty):
    def adagrad(self, operands: Operands, **numbers: Any) -> None:
        parts = {name: [t[:-1] for t in getattr(operands, name)] for name in ("params", "grads", "firsts", "outs")}
        super().adagrad(Operands(**parts), **numbers)


class WritesTheGradient(Faulty):
    def momentum(self, operands: Operands, **numbers: Any) -> None:
        super().momentum(operands, **numbers)
        operands.grads[-1].mul_(2)


class SumsInSixteenBits(Faulty):
    def sums_of_squares(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return super().sums_of_squares([tensor.bfloat16() for tensor in tensors])


class AddsBackwards(Faulty):
    def combine(self, output: torch.Tensor, terms: Sequence[torch.Tensor], reduction: Any = "sum") -> None:
        super().combine(output, list(reversed(terms)), reduction)


class RoundsHalvesUp(Faulty):
    def quantize(self, values: torch.Tensor, data: torch.Tensor, scales: torch.Tensor, **how: Any) -> None:
        super().quantize(values, data, scales, **how)
        data[-1] ^= 1


class NeverAdds(Faulty):
    def dequantize(self, data: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, **how: Any) -> None:
        super().dequantize(data, scales, out, **{**how, "add": False})


class MistakesTheStep(Faulty):
    def lamb_moments(self, operands: Operands, **numbers: Any) -> torch.Tensor:
        return super().lamb_moments(operands, **{**numbers, "step": numbers["step"] + 1})


class SwapsTheRates(Faulty):
    def lamb_apply(self, operands: Operands, **numbers: Any) -> None:
        super().lamb_apply(operands, **{**numbers, "rates": numbers["rates"].flip(0)})


FAULTS: dict[str, Callable[[ModuleType], CpuKernels]] = {
    "adam": RoundsTheRate,
    "lion": ForgetsTheScale,
    "adagrad": ForgetsTheLastElement,
    "momentum": WritesTheGradient,
    "sums_of_squares": SumsInSixteenBits,
    "combine": AddsBackwards,
    "quantize": RoundsHalvesUp,
    "dequantize": NeverAdds,
    "lamb_moments": MistakesTheStep,
    "lamb_apply": SwapsTheRates,
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_fault_is_found(module: ModuleType, name: str) -> None:
    """The cases that a user can run find a kernel that is a little wrong."""
    finding = attrs.evolve(next(check(cases=1)), worst=worst_of(FAULTS[name](module), name, range(40)))
    assert not finding.good
