"""What the optimizers of this package have in common: state like torch's, and updates by the device's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from powertrain.errors import OptimizerError
from powertrain.kernels import kernel, reference
from powertrain.kernels.updates import Operands
from powertrain.roles.optimizer import FlatOptimizer
from powertrain_optimizers.operands import Row, batches

ON_DEVICES = (torch.float32, torch.bfloat16, torch.float16)
"""Formats of parameters that devices' kernels take; others are left to the reference."""


class KernelOptimizer(FlatOptimizer):
    """A ``FlatOptimizer`` with torch's state names, that updates by kernels."""

    # --- what one parameter has ------------------------------------------------------------

    def gradient(self, param: torch.nn.Parameter) -> torch.Tensor:
        """Return the gradient before it is scaled: dense, flat or of the parameter's shape."""
        grad = self.grad_of(param)
        return grad.to_dense() if grad.layout != torch.strided else grad

    def zeros(self, key: str, param: torch.nn.Parameter) -> torch.Tensor:
        """Return the first value of state that goes with the elements."""
        return torch.zeros_like(param, memory_format=torch.preserve_format, dtype=self.format_of(key, param))

    def format_of(self, key: str, param: torch.Tensor) -> torch.dtype:
        """Return the format in which state rests: real formats say nothing about complex parameters."""
        return param.dtype if param.is_complex() else super().format_of(key, param)

    def entry(self, key: str, param: torch.nn.Parameter) -> torch.Tensor:
        """Return state that goes with the elements, zeros at the first time."""
        state = self.state[param]
        if key not in state:
            state[key] = self.zeros(key, param)
        value: torch.Tensor = state[key]
        return value

    def counted(self, params: Sequence[torch.nn.Parameter]) -> dict[int, list[torch.nn.Parameter]]:
        """Count a step of each parameter; return them by their numbers of steps, which start at 1."""
        result: dict[int, list[torch.nn.Parameter]] = {}
        for param in params:
            state = self.state[param]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            state["step"] += 1
            result.setdefault(int(state["step"]), []).append(param)
        return result

    def scale(self, group: Mapping[str, Any]) -> float | torch.Tensor:
        """Return what gradients are multiplied by, the sign that ``maximize`` turns included."""
        return -self.request.scale if group.get("maximize") else self.request.scale

    # --- calls ---------------------------------------------------------------------------------

    def rows(
        self, params: Sequence[torch.nn.Parameter], first: str | None = None, second: str | None = None
    ) -> list[Row]:
        """Return the tensors of an update, with the state of these keys."""
        return [
            Row(
                param.detach(),
                self.gradient(param),
                None if first is None else self.entry(first, param),
                None if second is None else self.entry(second, param),
                self.request.outs.get(param),
            )
            for param in params
        ]

    def update_by(
        self,
        name: str,
        params: Sequence[torch.nn.Parameter],
        first: str | None = None,
        second: str | None = None,
        **numbers: Any,
    ) -> None:
        """Update parameters by one call of a kernel for each format that they have."""
        for _, operands in batches(self.rows(params, first, second)):
            self.kernel_for(name, operands)(operands, **numbers)

    def kernel_for(self, name: str, operands: Operands) -> Callable[..., Any]:
        """Return the device's kernel, or the reference where there is none for these formats."""
        accelerator = self.accelerator_for(operands.params[0])
        if accelerator is None or operands.params[0].dtype not in ON_DEVICES:
            return reference(name)
        return kernel(accelerator, name)

    # --- updates that no kernel makes ------------------------------------------------------------

    def scaled(self, group: Mapping[str, Any], param: torch.nn.Parameter) -> torch.Tensor:
        """Return a scaled copy of the gradient, of the parameter's shape, in the format in which it is computed."""
        grad = self.gradient(param)
        return real(grad if grad.shape == param.shape else grad.view(param.shape)).to(width(param)) * self.scale(group)

    def publish(self, params: Sequence[torch.nn.Parameter]) -> None:
        """Write new values where they are wanted as well; for updates that no kernel makes."""
        for param in params:
            out = self.request.outs.get(param)
            if out is not None:
                out.copy_(param.view_as(out))


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or the real and imaginary parts of a complex one along a further dimension, as a view."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def width(param: torch.Tensor) -> torch.dtype:
    """Return the format in which a parameter is computed: the wider of its own and fp32."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


@contextmanager
def widened(param: torch.Tensor, *state: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Let a block change a parameter and its state in a format that is wide enough; then round what is narrower."""
    places = [real(tensor.detach()) for tensor in (param, *state)]
    values = [place.to(width(param)) for place in places]
    yield values
    for place, value in zip(places, values, strict=True):
        if place is not value:
            place.copy_(value)


def only_real(params: Sequence[torch.Tensor], name: str) -> None:
    """Refuse complex parameters.

    Raises:
        OptimizerError: one is complex.
    """
    if any(param.is_complex() for param in params):
        raise OptimizerError(
            f"{name} cannot update a complex parameter",
            where="optimizer.param_groups",
            expected="real parameters",
            remedy="keep real and imaginary part as two parameters, or use adamw",
        )


def not_negative(**numbers: Any) -> None:
    """Refuse options below zero.

    Raises:
        ValueError: as torch's optimizers do.
    """
    for name, number in numbers.items():
        if not float(number) >= 0:
            raise ValueError(f"{name} must not be negative, but is {number}")


def decays(betas: Sequence[float]) -> None:
    """Refuse decays that are no decays.

    Raises:
        ValueError: one is not in [0, 1).
    """
    for beta in betas:
        if not 0 <= float(beta) < 1:
            raise ValueError(f"betas must be at least 0 and less than 1, but are {tuple(betas)}")


def refuse(group: Mapping[str, Any], key: str, name: str) -> None:
    """Refuse a switch of torch's optimizer that a loaded group has on, and this one does not know.

    Raises:
        OptimizerError: it is on.
    """
    if group.get(key):
        raise OptimizerError(
            f"{name} has no {key}",
            where=f"optimizer.param_groups: {key}",
            expected="false",
            found="true",
            remedy=f'use torch\'s own class by its dotted name: `[optimizer] name = "torch.optim.{name}"`',
        )
