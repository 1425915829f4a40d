"""What an accelerator asks for its kernels: triton is imported when the first one is wanted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

NAMES = {
    "adam": "updates",
    "lion": "updates",
    "adagrad": "updates",
    "momentum": "updates",
    "lamb_moments": "updates",
    "lamb_apply": "updates",
    "sums_of_squares": "sums",
    "combine": "sums",
    "quantize": "blockwise",
    "dequantize": "blockwise",
    "rms_norm": "norms",
    "layer_norm": "norms",
    "rotary": "rotary",
    "swiglu": "swiglu",
    "softmax_cross_entropy": "losses",
    "cross_entropy": "losses",
}
"""Every kernel, and the module of this package that launches it."""

TABLED = ("updates", "sums")
"""The modules whose kernels are methods, as they share tables."""

_log = logging.getLogger("powertrain.triton")


class Offer:
    """Gives kernels by name, or None where triton cannot run, which is said once."""

    def __init__(self) -> None:
        self._runs: bool | None = None
        self._homes: dict[str, Any] = {}

    def get(self, name: str) -> Callable[..., Any] | None:
        """Return the kernel called ``name``; None if there is none, or triton cannot run here."""
        if name not in NAMES:
            return None
        if self._runs is None:
            complaint = _complaint()
            self._runs = not complaint
            if complaint:
                _log.warning(
                    "there are no Triton kernels (%s); the PyTorch reference runs instead. To fix: install the triton "
                    "that belongs to this version of torch, and a C compiler",
                    complaint,
                )
        if not self._runs:
            return None
        if not self._homes:
            self._homes = homes()
        found: Callable[..., Any] = getattr(self._homes[NAMES[name]], name)
        return found


def homes() -> dict[str, Any]:
    """Return for each module what its kernels are attributes of: the module, or an object with the tables."""
    modules = {module: import_module(f"powertrain_triton.{module}") for module in dict.fromkeys(NAMES.values())}
    tables = import_module("powertrain_triton.table").Tables()
    return {name: module.Kernels(tables) if name in TABLED else module for name, module in modules.items()}


def _complaint() -> str:
    """Say why triton cannot run here; nothing if it can."""
    try:
        from triton.runtime import driver

        from powertrain_triton.device.formats import INTERPRETED
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if not INTERPRETED.value:
        try:
            driver.active.get_current_target()
        except Exception as error:  # each backend has its own: no driver, no device, no compiler
            return f"triton finds no device: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""
