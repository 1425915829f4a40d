"""What devices do faster than torch: each kernel's name, its arguments, and a PyTorch reference.

``kernel(accelerator, name)`` returns the device's own kernel, or the reference here, which takes the same
arguments and gives the same answer. The functions of this package are that reference: ``adam``, ``lion``,
``adagrad``, ``momentum``, ``lamb_moments`` and ``lamb_apply`` (in ``updates``), ``sums_of_squares`` and
``combine`` (in ``sums``), ``quantize`` and ``dequantize`` (in ``blockwise``), ``rms_norm``, ``layer_norm``,
``rotary``, ``swiglu``, ``softmax_cross_entropy`` and ``cross_entropy`` (in ``layers``).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powertrain.roles.accelerator import Accelerator

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
    "rms_norm": "layers",
    "layer_norm": "layers",
    "rotary": "layers",
    "swiglu": "layers",
    "softmax_cross_entropy": "layers",
    "cross_entropy": "layers",
}
"""Every kernel, and the module of this package that has its reference."""


def reference(name: str) -> Callable[..., Any]:
    """Return the PyTorch reference of the kernel called ``name``; KeyError if there is no such kernel."""
    function: Callable[..., Any] = getattr(import_module(f"powertrain.kernels.{NAMES[name]}"), name)
    return function


def kernel(accelerator: Accelerator, name: str) -> Callable[..., Any]:
    """Return the accelerator's kernel called ``name``, or the reference; KeyError if there is no such kernel."""
    own = accelerator.kernel(name) if name in NAMES else None
    return own or reference(name)
