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

_log = logging.getLogger("powertrain.triton")


class Offer:
    """Gives kernels by name, or None where triton cannot run, which is said once."""

    def __init__(self) -> None:
        self._runs: bool | None = None

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
        found: Callable[..., Any] = getattr(import_module(f"powertrain_triton.{NAMES[name]}"), name)
        return found


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
