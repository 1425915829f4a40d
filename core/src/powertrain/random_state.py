"""Every random generator in use: seeded together, saved and restored together."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from powertrain.context import Context

_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of neighbouring ranks: 2**64 over the golden ratio, odd, and far from any seed people choose."""


def seed_all(context: Context, seed: int) -> None:
    """Seed Python's, NumPy's (if loaded), torch's and the device's generators.

    Ranks of different data index differ, so that dropout does; the first one's seed is ``seed`` itself.
    """
    value = (seed + context.mesh.index("data") * _STRIDE) % 2**63
    random.seed(value)
    torch.default_generator.manual_seed(value)
    context.accelerator.seed(value, context.device)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(value % 2**32)


def state_values() -> dict[str, Any]:
    """Return the generators that are JSON: Python's, and NumPy's if it is loaded."""
    version, numbers, gauss = random.getstate()
    values: dict[str, Any] = {"python": [version, list(numbers), gauss]}
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        values["numpy"] = [kind, keys.tolist(), position, has_gauss, cached]
    return values


def load_values(values: dict[str, Any]) -> None:
    """Continue from ``state_values``."""
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "numpy" in values:
        import numpy

        kind, keys, position, has_gauss, cached = values["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))


def state_tensors(context: Context) -> dict[str, torch.Tensor]:
    """Return the generators whose state is a uint8 tensor: torch's and the device's."""
    tensors = {"torch": torch.get_rng_state()}
    if context.device.type != "cpu":
        tensors[context.accelerator.name] = context.accelerator.rng_state(context.device)
    return tensors


def load_tensors(context: Context, tensors: dict[str, torch.Tensor]) -> None:
    """Continue from ``state_tensors``; a generator of another kind of device is left alone."""
    if "torch" in tensors:
        torch.set_rng_state(tensors["torch"])
    if context.accelerator.name in tensors:
        context.accelerator.set_rng_state(tensors[context.accelerator.name], context.device)
