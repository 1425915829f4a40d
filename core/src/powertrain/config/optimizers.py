"""The options of the optimizers that the core knows by name: torch's own, with torch's names and defaults.

Plugins add further names; a dotted path takes whatever its class takes.
"""

from __future__ import annotations

from typing import Any

import attrs
from attrs import validators

from powertrain.config.constraints import finite


def _number(default: float) -> Any:
    return attrs.field(default=default, validator=[validators.ge(0), finite])


def _betas() -> Any:
    return attrs.field(
        default=(0.9, 0.999), validator=validators.deep_iterable(validators.and_(validators.ge(0), validators.lt(1)))
    )


@attrs.frozen(kw_only=True)
class Loop:
    """How torch runs an update; nothing here changes what is computed beyond rounding."""

    maximize: bool = False
    """Climb the loss instead of descending it."""

    foreach: bool | None = None
    """Update all tensors in a few calls; costs temporaries as large as the parameters. Absent: torch chooses."""


@attrs.frozen(kw_only=True)
class CapturableLoop(Loop):
    """How torch runs an update whose step count may live on the device."""

    capturable: bool = False
    """Keep the step count on the device, so that a captured graph can replay the update."""


@attrs.frozen(kw_only=True)
class FusedLoop(Loop):
    """How torch runs an update that has a fused kernel."""

    fused: bool | None = None
    """Update all tensors in one kernel. Absent: torch chooses."""


@attrs.frozen(kw_only=True)
class Adam(FusedLoop):
    """Adam (Kingma and Ba, 2015); weight decay is added to the gradient."""

    lr: float = _number(1e-3)
    """Learning rate at the peak of the schedule."""

    betas: tuple[float, float] = _betas()
    """Decay of the running averages of the gradient and of its square, per step."""

    eps: float = _number(1e-8)
    """Added to the denominator, so that a parameter without gradient does not divide by zero."""

    weight_decay: float = _number(0.0)
    """Factor on the parameter, added to its gradient."""

    amsgrad: bool = False
    """Divide by the largest running square so far; costs one more tensor a parameter."""

    capturable: bool = False
    """Keep the step count on the device, so that a captured graph can replay the update."""


@attrs.frozen(kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    weight_decay: float = _number(1e-2)
    """Fraction of the parameter, times the learning rate, that each step takes away."""


@attrs.frozen(kw_only=True)
class SGD(FusedLoop):
    """Stochastic gradient descent, with momentum if asked for."""

    lr: float = _number(1e-3)
    """Learning rate at the peak of the schedule."""

    momentum: float = _number(0.0)
    """Decay of the running sum of gradients, per step; 0 keeps none."""

    dampening: float = attrs.field(default=0.0, validator=finite)
    """One minus the weight of a new gradient in the running sum."""

    weight_decay: float = _number(0.0)
    """Factor on the parameter, added to its gradient."""

    nesterov: bool = attrs.field(default=False)
    """Look ahead along the momentum; needs momentum above 0 and no dampening."""

    @nesterov.validator
    def _check_nesterov(self, attribute: attrs.Attribute[bool], value: bool) -> None:
        if value and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs momentum above 0 and dampening = 0")


@attrs.frozen(kw_only=True)
class Adagrad(FusedLoop):
    """Adagrad (Duchi, Hazan and Singer, 2011)."""

    lr: float = _number(1e-2)
    """Learning rate at the peak of the schedule."""

    lr_decay: float = _number(0.0)
    """The learning rate is divided by 1 + steps x lr_decay."""

    weight_decay: float = _number(0.0)
    """Factor on the parameter, added to its gradient."""

    initial_accumulator_value: float = _number(0.0)
    """What the sum of squared gradients starts from."""

    eps: float = _number(1e-10)
    """Added to the denominator, so that a parameter without gradient does not divide by zero."""


@attrs.frozen(kw_only=True)
class RMSprop(CapturableLoop):
    """RMSprop (Hinton, 2012), optionally centered (Graves, 2013)."""

    lr: float = _number(1e-2)
    """Learning rate at the peak of the schedule."""

    alpha: float = _number(0.99)
    """Decay of the running average of squared gradients, per step."""

    eps: float = _number(1e-8)
    """Added to the denominator, so that a parameter without gradient does not divide by zero."""

    weight_decay: float = _number(0.0)
    """Factor on the parameter, added to its gradient."""

    momentum: float = _number(0.0)
    """Decay of the running sum of updates, per step; 0 keeps none."""

    centered: bool = False
    """Divide by the variance of the gradient instead of its square; costs one more tensor a parameter."""


@attrs.frozen(kw_only=True)
class NAdam(CapturableLoop):
    """Adam with Nesterov momentum (Dozat, 2016)."""

    lr: float = _number(2e-3)
    """Learning rate at the peak of the schedule."""

    betas: tuple[float, float] = _betas()
    """Decay of the running averages of the gradient and of its square, per step."""

    eps: float = _number(1e-8)
    """Added to the denominator, so that a parameter without gradient does not divide by zero."""

    weight_decay: float = _number(0.0)
    """Factor on the parameter, added to its gradient, or taken away as in AdamW if decoupled."""

    momentum_decay: float = _number(4e-3)
    """How fast the momentum approaches its final value."""

    decoupled_weight_decay: bool = False
    """Take weight decay from the parameter, as AdamW does, instead of adding it to the gradient."""


@attrs.frozen(kw_only=True)
class RAdam(CapturableLoop):
    """Adam with a rectified adaptive rate (Liu and others, 2020)."""

    lr: float = _number(1e-3)
    """Learning rate at the peak of the schedule."""

    betas: tuple[float, float] = _betas()
    """Decay of the running averages of the gradient and of its square, per step."""

    eps: float = _number(1e-8)
    """Added to the denominator, so that a parameter without gradient does not divide by zero."""

    weight_decay: float = _number(0.0)
    """Factor on the parameter, added to its gradient, or taken away as in AdamW if decoupled."""

    decoupled_weight_decay: bool = False
    """Take weight decay from the parameter, as AdamW does, instead of adding it to the gradient."""


@attrs.frozen(kw_only=True)
class Adamax(CapturableLoop):
    """Adam with the infinity norm (Kingma and Ba, 2015)."""

    lr: float = _number(2e-3)
    """Learning rate at the peak of the schedule."""

    betas: tuple[float, float] = _betas()
    """Decay of the running average of the gradient and of its largest magnitude, per step."""

    eps: float = _number(1e-8)
    """Added to the denominator, so that a parameter without gradient does not divide by zero."""

    weight_decay: float = _number(0.0)
    """Factor on the parameter, added to its gradient."""


OPTIMIZERS: dict[str, type[Any]] = {
    "adamw": AdamW,
    "adam": Adam,
    "sgd": SGD,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "nadam": NAdam,
    "radam": RAdam,
    "adamax": Adamax,
}
"""Name in the configuration to the options of the torch optimizer of that name."""
