"""The options of the learning-rate schedules that the core knows by name.

A schedule is a factor on the optimizer's ``lr``, its peak. Lengths are in optimizer
steps; after the last step the final value holds.
"""

from __future__ import annotations

from typing import Any, Literal

import attrs
from attrs import validators


def _steps() -> Any:
    return attrs.field(validator=validators.ge(1))


def _fraction(default: float) -> Any:
    return attrs.field(default=default, validator=[validators.ge(0), validators.le(1)])


@attrs.frozen(kw_only=True)
class Constant:
    """The peak all along, after a linear warm-up."""

    warmup: int = attrs.field(default=0, validator=validators.ge(0))
    """Steps over which the learning rate rises from 0 to its peak. Default 0: none."""


@attrs.frozen(kw_only=True)
class Decay:
    """What schedules with a warm-up and an end have in common."""

    steps: int = _steps()
    """Steps of the whole schedule, warm-up included."""

    warmup: int = attrs.field(default=0, validator=validators.ge(0))
    """Steps over which the learning rate rises from 0 to its peak. Default 0: none."""

    final: float = _fraction(0.0)
    """Fraction of the peak at which the schedule ends. Default 0."""

    @warmup.validator
    def _check_warmup(self, attribute: attrs.Attribute[int], value: int) -> None:
        if value > self.steps:
            raise ValueError(f"warmup must fit into steps, but {value} > {self.steps}")


@attrs.frozen(kw_only=True)
class Linear(Decay):
    """A linear warm-up, then a straight line down to ``final``."""


@attrs.frozen(kw_only=True)
class Cosine(Decay):
    """A linear warm-up, then half a cosine down to ``final`` (Loshchilov and Hutter, 2017)."""


@attrs.frozen(kw_only=True)
class WarmupStableDecay(Decay):
    """A linear warm-up, the peak, then a decay to ``final`` over the last steps (Hu and others, 2024)."""

    decay: int = _steps()
    """Steps of the decay at the end."""

    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Form of the decay; sqrt is one minus the square root of the decay's progress. Default linear."""

    @decay.validator
    def _check_decay(self, attribute: attrs.Attribute[int], value: int) -> None:
        if self.warmup + value > self.steps:
            raise ValueError(f"warmup and decay must fit into steps, but {self.warmup} + {value} > {self.steps}")


@attrs.frozen(kw_only=True)
class OneCycle:
    """A linear warm-up, half a cosine up to the peak, then half a cosine down to ``final`` (Smith and Topin, 2018)."""

    steps: int = _steps()
    """Steps of the whole schedule, warm-up included."""

    warmup: int = attrs.field(default=0, validator=validators.ge(0))
    """Steps over which the learning rate rises from 0 to ``start``. Default 0: none."""

    up: float = _fraction(0.3)
    """Fraction of the cycle, the steps after the warm-up, in which the learning rate rises to its peak. Default 0.3."""

    start: float = _fraction(0.04)
    """Fraction of the peak at which the cycle begins. Default 0.04."""

    final: float = _fraction(4e-6)
    """Fraction of the peak at which the cycle ends. Default 4e-6."""

    @warmup.validator
    def _check_warmup(self, attribute: attrs.Attribute[int], value: int) -> None:
        if value > self.steps:
            raise ValueError(f"warmup must fit into steps, but {value} > {self.steps}")


SCHEDULES: dict[str, type[Any]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "wsd": WarmupStableDecay,
    "one-cycle": OneCycle,
}
"""Name in the configuration to the options of the schedule."""
