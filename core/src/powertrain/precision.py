"""Number formats of a run, and the loss scale that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch

from powertrain.config.tables import Precision
from powertrain.errors import PrecisionError
from powertrain.roles.accelerator import Accelerator

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@attrs.frozen(kw_only=True)
class Recipe:
    """Which number format each part of a step uses.

    Attributes:
        compute: activations, and gradients as backward makes them.
        parameters: what the model's parameters are held in.
        master: what the optimizer updates.
        reduce: what gradients are sent and averaged in.
        accumulate: what gradients of several micro-batches add up in.
        state: what optimizer state is kept in between steps, where the optimizer wrapper can.
        autocast: whether the forward pass runs under torch.autocast(compute).
    """

    compute: torch.dtype
    parameters: torch.dtype
    master: torch.dtype
    reduce: torch.dtype
    accumulate: torch.dtype
    state: torch.dtype
    autocast: bool

    @classmethod
    def build(cls, table: Precision, accelerator: Accelerator) -> Recipe:
        """Make the recipe of a ``[precision]`` table.

        Raises:
            PrecisionError: the accelerator cannot compute in that format.
        """
        compute = FORMATS[table.compute]
        master = FORMATS[table.master or "fp32"]
        legal = accelerator.dtypes()
        for key, dtype in (("compute", compute), ("master", master)):
            if dtype not in legal:
                names = [name for name, value in FORMATS.items() if value in legal]
                raise PrecisionError(
                    f"accelerator {accelerator.name!r} does not support {_short(dtype)}",
                    where=f"precision.{key}",
                    expected=f"one of {', '.join(names)}",
                )
        return cls(
            compute=compute,
            parameters=master if table.autocast else compute,
            master=master,
            reduce=FORMATS[table.reduce or "fp32"],
            accumulate=FORMATS[table.accumulate or table.reduce or "fp32"],
            state=FORMATS[table.optimizer] if table.optimizer else master,
            autocast=table.autocast and compute != torch.float32,
        )

    def forward(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context in which a forward pass runs."""
        if self.autocast:
            return torch.autocast(device.type, dtype=self.compute)
        return nullcontext()

    @property
    def cast_inputs(self) -> torch.dtype | None:
        """The format that floating-point inputs are converted to; None under autocast."""
        return None if self.autocast or self.parameters == torch.float32 else self.parameters

    def __str__(self) -> str:
        names = ("compute", "parameters", "master", "reduce", "accumulate", "state")
        parts = [f"{name} {_short(getattr(self, name))}" for name in names]
        return ", ".join(parts) + (", autocast" if self.autocast else "")


def _short(dtype: torch.dtype) -> str:
    return next((name for name, value in FORMATS.items() if value == dtype), str(dtype))


class LossScale:
    """The factor on the loss, static or dynamic.

    Dynamic: halved when a gradient overflows (that step is skipped), doubled
    after ``window`` steps without an overflow (Micikevicius et al., "Mixed
    Precision Training", 2018).

    Attributes:
        value: the current factor.
        skipped: how many steps were skipped for an overflow.
    """

    def __init__(self, value: float, *, dynamic: bool, checked: bool, window: int = 1000) -> None:
        self.value = value
        self.dynamic = dynamic
        self.checked = checked
        self.window = window
        self.good_steps = 0
        self.skipped = 0

    @classmethod
    def build(cls, table: Precision) -> LossScale:
        """Make the loss scale of a ``[precision]`` table."""
        scale = table.loss_scale
        if scale is None:
            scale = "dynamic" if table.compute == "fp16" else 1.0
        if scale == "dynamic":
            return cls(65536.0, dynamic=True, checked=True)
        return cls(float(scale), dynamic=False, checked=table.compute == "fp16" or scale != 1.0)

    def update(self, *, applied: bool) -> None:
        """Adapt to a step that was applied, or skipped for an overflow.

        Raises:
            PrecisionError: gradients overflow although the scale is at its minimum.
        """
        if not applied:
            self.skipped += 1
            self.good_steps = 0
            if not self.dynamic:
                return
            if self.value <= 1.0:
                raise PrecisionError(
                    "gradients are not finite although the loss scale has fallen to 1",
                    found=f"{self.skipped} steps skipped so far",
                    remedy='lower the learning rate, set `[optimizer] clip`, or use `[precision] compute = "bf16"`',
                )
            self.value = max(1.0, self.value / 2)
            return
        self.good_steps += 1
        if self.dynamic and self.good_steps % self.window == 0:
            self.value = min(self.value * 2, 2.0**24)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs to continue."""
        return {
            "dynamic": self.dynamic,
            "value": self.value,
            "good_steps": self.good_steps,
            "skipped": self.skipped,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; the value only from one dynamic scale to another."""
        if self.dynamic and state["dynamic"]:
            self.value = float(state["value"])
        self.good_steps = int(state["good_steps"])
        self.skipped = int(state["skipped"])


class _ScaleGradient(torch.autograd.Function):
    """The identity in forward, a factor in backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Return ``tensor`` itself, whose gradient will be multiplied by ``factor``.

    Putting the loss scale and the 1/accumulation here, not in ``backward``,
    makes plain ``loss.backward()`` and several losses right as well.
    """
    if factor == 1.0 or not tensor.requires_grad:
        return tensor
    scaled: torch.Tensor = _ScaleGradient.apply(tensor, factor)
    return scaled
