"""How much state will rest where, before any of it does: tiers refuse what they have no room for."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch

from powertrain.roles.optimizer import FlatOptimizer
from powertrain.roles.tier import Tier
from powertrain_zero.chunk import Tiers
from powertrain_zero.work import twin_of

_SIDE = 64
"""The probed matrix has so many rows and columns: factored state is small beside it."""


class Needs:
    """Adds up bytes by category.

    Args:
        tiers: which are told.
        optimizer: whose state is counted.
        master: the format of masters.
        state: the format in which state rests, where the optimizer does not say another.
    """

    def __init__(self, tiers: Tiers, optimizer: torch.optim.Optimizer, master: torch.dtype, state: torch.dtype) -> None:
        self._tiers = tiers
        self._master = master
        self._bytes: dict[str, int] = defaultdict(int)
        self._per_element = 0.0
        if not tiers.optimizer.stays:
            self._per_element = bytes_per_element(optimizer, master, state)

    def add(self, numel: int, *, source: torch.dtype, gradient: torch.dtype | None, apart: bool) -> None:
        """Count a slice.

        Args:
            numel: its elements.
            source: the format that is gathered from.
            gradient: the format in which gradients add up; None for frozen parameters.
            apart: masters rest apart from it.
        """
        self._bytes["parameters"] += numel * source.itemsize
        if gradient is not None:
            self._bytes["gradients"] += numel * gradient.itemsize
            self._bytes["optimizer"] += int(numel * ((self._master.itemsize if apart else 0) + self._per_element))

    def announce(self) -> None:
        """Tell the tiers.

        Raises:
            StorageError: one of them has less room.
        """
        for name, tier in self._named().items():
            if not tier.stays:
                tier.expect(self._bytes[name])

    def _named(self) -> Mapping[str, Tier]:
        return {name: getattr(self._tiers, name) for name in ("optimizer", "gradients", "parameters")}


@torch.no_grad()
def bytes_per_element(optimizer: torch.optim.Optimizer, master: torch.dtype, state: torch.dtype) -> float:
    """Return what an optimizer keeps for an element of a matrix, found by a step of a copy of it.

    A guess (two moments) where a copy cannot take a step alone.
    """
    param = torch.nn.Parameter(torch.full((_SIDE, _SIDE), 0.5, dtype=master))
    probe = twin_of(optimizer)
    probe.state = defaultdict(dict)
    probe.param_groups = [
        {**group, "params": [param] if index == 0 else []} for index, group in enumerate(optimizer.param_groups)
    ]
    try:
        param.grad = torch.full_like(param, 0.25)
        if isinstance(probe, FlatOptimizer):
            probe.accelerator = None
        probe.step()
    except Exception:  # of whatever kind optimizers raise that want more than one matrix
        return 2.0 * master.itemsize
    kept = [value for value in probe.state[param].values() if isinstance(value, torch.Tensor) and value.ndim > 0]
    flat = isinstance(optimizer, FlatOptimizer)
    sizes = [
        math.prod(value.shape) * (value.element_size() if flat or not value.is_floating_point() else state.itemsize)
        for value in kept
    ]
    return sum(sizes) / param.numel()
