"""The processor's own kernels: the arguments of ``powertrain.kernels``, passed to C++ as addresses and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from powertrain import kernels
from powertrain.kernels.blockwise import blocks_of
from powertrain.kernels.updates import Operands, corrections
from powertrain.roles.communicator import Reduction
from powertrain_cpu.source import KERNELS

PATHS = ("plain", "avx2", "avx512")
"""Vector instruction sets, from the narrowest to the widest."""

FORMATS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int32: 6,
    torch.int64: 7,
}
"""Every type that C++ knows; ``formats.h`` has the same numbers."""

UPDATED = (torch.float32, torch.bfloat16, torch.float16)
"""Types of parameters, gradients and state."""

FIRSTS = ("firsts",)
BOTH = ("firsts", "seconds")
"""The state that a rule must be given."""

REDUCTIONS: dict[Reduction, int] = {"sum": 0, "mean": 1, "max": 2, "min": 3}
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)


class CpuKernels:
    """The kernels of one built module, on one vector path.

    Args:
        module: what ``native`` loaded from ``source.SOURCE``.
        path: one of ``PATHS`` that this processor runs; by default the widest.
    """

    def __init__(self, module: ModuleType, path: str | None = None) -> None:
        self._module = module
        widest = module.widest_path()
        self._path = widest if path is None else PATHS.index(path)
        if self._path > widest:
            raise ValueError(f"this processor has no {path}")

    @property
    def path(self) -> str:
        """The vector path in use."""
        return PATHS[self._path]

    def get(self, name: str) -> Callable[..., Any] | None:
        """Return the kernel called ``name``."""
        return getattr(self, name) if name in KERNELS else None

    def _where(self) -> tuple[int, int]:
        return torch.get_num_threads(), self._path

    def adam(
        self,
        operands: Operands,
        *,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled: bool,
        scale: float | torch.Tensor = 1.0,
    ) -> None:
        """Update by Adam or AdamW; see ``powertrain.kernels.updates``."""
        bias1, root_bias2 = corrections(step, beta1, beta2)
        decay, shrink = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
        numbers = (float(scale), beta1, beta2, eps, decay, shrink, lr / bias1, root_bias2)
        self._module.adam(_group(operands, BOTH), *numbers, *self._where())

    def lion(
        self,
        operands: Operands,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        scale: float | torch.Tensor = 1.0,
    ) -> None:
        """Update by Lion; see ``powertrain.kernels.updates``."""
        numbers = (float(scale), lr, beta1, beta2, 1 - lr * weight_decay)
        self._module.lion(_group(operands, FIRSTS), *numbers, *self._where())

    def adagrad(
        self,
        operands: Operands,
        *,
        step: int,
        lr: float,
        lr_decay: float,
        eps: float,
        weight_decay: float,
        scale: float | torch.Tensor = 1.0,
    ) -> None:
        """Update by Adagrad; see ``powertrain.kernels.updates``."""
        rate = lr / (1 + (step - 1) * lr_decay)
        self._module.adagrad(_group(operands, FIRSTS), float(scale), rate, eps, weight_decay, *self._where())

    def momentum(
        self,
        operands: Operands,
        *,
        lr: float,
        momentum: float,
        dampening: float,
        nesterov: bool,
        weight_decay: float,
        first_time: bool,
        scale: float | torch.Tensor = 1.0,
    ) -> None:
        """Update by gradient descent with momentum; see ``powertrain.kernels.updates``."""
        numbers = (float(scale), lr, momentum, 1 - dampening, weight_decay, nesterov, first_time)
        self._module.momentum(_group(operands), *numbers, *self._where())

    def lamb_moments(
        self,
        operands: Operands,
        *,
        step: int,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        scale: float | torch.Tensor = 1.0,
    ) -> torch.Tensor:
        """Update the moments of LAMB; see ``powertrain.kernels.updates``."""
        numbers = (float(scale), beta1, beta2, eps, weight_decay, *corrections(step, beta1, beta2))
        found = self._module.lamb_moments(_group(operands, BOTH), *numbers, *self._where())
        return torch.tensor(found, dtype=torch.float32, device="cpu").view(len(operands.params), 2)

    def lamb_apply(
        self,
        operands: Operands,
        *,
        rates: torch.Tensor,
        step: int,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        """Move parameters by LAMB; see ``powertrain.kernels.updates``."""
        numbers = (beta1, beta2, eps, weight_decay, *corrections(step, beta1, beta2))
        if rates.numel() != len(operands.params):
            raise ValueError(f"there are {rates.numel()} rates for {len(operands.params)} parameters")
        self._module.lamb_apply(_group(operands, BOTH), rates.tolist(), *numbers, *self._where())

    def sums_of_squares(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of squares of each tensor; see ``powertrain.kernels.sums``."""
        result = torch.zeros(len(tensors), dtype=torch.float32, device="cpu")
        for dtype in {tensor.dtype for tensor in tensors}:
            chosen = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
            if dtype not in UPDATED:
                result[chosen] = kernels.reference("sums_of_squares")([tensors[index] for index in chosen])
                continue
            addresses, counts = _addresses([tensors[index] for index in chosen]), [tensors[i].numel() for i in chosen]
            found = self._module.sums_of_squares(addresses, counts, FORMATS[dtype], *self._where())
            result[chosen] = torch.tensor(found, dtype=torch.float32, device="cpu")
        return result

    def combine(self, output: torch.Tensor, terms: Sequence[torch.Tensor], reduction: Reduction = "sum") -> None:
        """Combine tensors into one; see ``powertrain.kernels.sums``."""
        if output.dtype not in FORMATS or (reduction == "mean" and output.dtype in INTEGERS):
            kernels.reference("combine")(output, terms, reduction)
            return
        _same("terms", [output, *terms])
        if len(terms) < 2:
            kernels.reference("combine")(output, terms, reduction)
            return
        (place,), places = _addresses([output]), _addresses(terms)
        self._module.combine(
            place, places, output.numel(), FORMATS[output.dtype], REDUCTIONS[reduction], *self._where()
        )

    def quantize(
        self, values: torch.Tensor, data: torch.Tensor, scales: torch.Tensor, *, bits: int, block: int
    ) -> None:
        """Quantize a flat tensor; see ``powertrain.kernels.blockwise``."""
        if values.dtype not in UPDATED or block > 1024:
            kernels.reference("quantize")(values, data, scales, bits=bits, block=block)
            return
        source, target, factors = _addresses([values, data, scales])
        blocks = blocks_of(values, data, scales, bits=bits, block=block)
        self._module.quantize(source, FORMATS[values.dtype], target, factors, bits, block, blocks, *self._where())

    def dequantize(
        self, data: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, *, bits: int, block: int, add: bool = False
    ) -> None:
        """Turn bytes back into a flat tensor; see ``powertrain.kernels.blockwise``."""
        if out.dtype not in UPDATED or block > 1024:
            kernels.reference("dequantize")(data, scales, out, bits=bits, block=block, add=add)
            return
        source, factors, target = _addresses([data, scales, out])
        blocks = blocks_of(out, data, scales, bits=bits, block=block)
        self._module.dequantize(source, factors, target, FORMATS[out.dtype], bits, block, blocks, add, *self._where())


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"a kernel of the processor takes tensors in the host's memory, not on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"a kernel takes contiguous tensors, not one with strides {tuple(tensor.stride())}")
    return [tensor.data_ptr() for tensor in tensors]


def _same(what: str, tensors: Sequence[torch.Tensor]) -> None:
    kinds = {(tensor.dtype, tensor.numel()) for tensor in tensors}
    if len(kinds) > 1:
        raise ValueError(f"the {what} differ in type or length: {kinds}")


def _format(what: str, tensors: Sequence[torch.Tensor]) -> int:
    if not tensors:
        return -1
    (dtype, *others) = {tensor.dtype for tensor in tensors}
    if others or dtype not in UPDATED:
        raise ValueError(f"the {what} are of {[dtype, *others]}; they must be of one type among {UPDATED}")
    return FORMATS[dtype]


def _group(operands: Operands, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Return the addresses, counts and formats of an update's tensors, once all that it reads and writes is there."""
    counts = [param.numel() for param in operands.params]
    lists = {name: getattr(operands, name) for name in ("params", "grads", "firsts", "seconds", "outs")}
    for name, tensors in lists.items():
        must = name in ("params", "grads", *needed)
        if (tensors or must) and [tensor.numel() for tensor in tensors] != counts:
            raise ValueError(f"the {name} have not the parameters' numbers of elements")
    formats = [_format(name, lists[name]) for name in ("params", "grads", "firsts", "outs")]
    if operands.seconds and _format("seconds", operands.seconds) != formats[2]:
        raise ValueError("first and second moments are of two types")
    return {**{name: _addresses(tensors) for name, tensors in lists.items()}, "counts": counts, "formats": formats}
