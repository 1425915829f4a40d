"""The options of each optimizer in ``[optimizer]``; names and defaults are torch's where torch has the optimizer."""

from __future__ import annotations

from typing import Any, Literal

import attrs
from attrs import validators

from powertrain.config.constraints import finite


def _number(default: float) -> Any:
    return attrs.field(default=default, validator=[validators.ge(0), finite])


def _perhaps() -> Any:
    return attrs.field(default=None, validator=validators.optional([validators.ge(0), finite]))


def _count(default: int, least: int = 1) -> Any:
    return attrs.field(default=default, validator=validators.ge(least))


def _betas(second: float = 0.999) -> Any:
    below_one = validators.and_(validators.ge(0), validators.lt(1))
    return attrs.field(default=(0.9, second), validator=validators.deep_iterable(below_one))


@attrs.frozen(kw_only=True)
class _Climbing:
    """What every optimizer takes."""

    maximize: bool = False
    """Climb the loss instead of descending it."""


@attrs.frozen(kw_only=True)
class Adam(_Climbing):
    """Adam (Kingma and Ba, 2014); weight decay is added to the gradient."""

    lr: float = _number(1e-3)
    """Learning rate at the peak of the schedule."""

    betas: tuple[float, float] = _betas()
    """Decay of the running averages of the gradient and of its square, per step."""

    eps: float = _number(1e-8)
    """Added to the denominator, so that a parameter without gradient does not divide by zero."""

    weight_decay: float = _number(0.0)
    """Factor on the parameter, added to its gradient."""


@attrs.frozen(kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2017)."""

    weight_decay: float = _number(1e-2)
    """Fraction of the parameter, times the learning rate, that each step takes away."""


@attrs.frozen(kw_only=True)
class SGD(_Climbing):
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
class Adagrad(_Climbing):
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
class Lion(_Climbing):
    """Lion (Chen et al., 2023): steps of one size along the sign of a momentum."""

    lr: float = _number(1e-4)
    """Size of every step, at the peak of the schedule; about a tenth of what AdamW takes."""

    betas: tuple[float, float] = _betas(0.99)
    """Weight of the momentum in the sign, and its decay per step."""

    weight_decay: float = _number(0.0)
    """Fraction of the parameter, times the learning rate, that each step takes away; about ten times AdamW's."""


@attrs.frozen(kw_only=True)
class Lamb(_Climbing):
    """LAMB (You et al., 2019): Adam with a trust ratio for each tensor."""

    lr: float = _number(1e-3)
    """Learning rate at the peak of the schedule."""

    betas: tuple[float, float] = _betas()
    """Decay of the running averages of the gradient and of its square, per step."""

    eps: float = _number(1e-6)
    """Added to the denominator, so that a parameter without gradient does not divide by zero."""

    weight_decay: float = _number(0.0)
    """Factor on the parameter, added to the direction."""

    min_ratio: float = _number(0.0)
    """The smallest trust ratio."""

    max_ratio: float = _number(10.0)
    """The largest trust ratio."""


@attrs.frozen(kw_only=True)
class Adafactor(_Climbing):
    """Adafactor (Shazeer and Stern, 2018): a row and a column in the place of the second moment."""

    lr: float = _number(1e-2)
    """The largest relative step, at the peak of the schedule."""

    beta2_decay: float = attrs.field(default=-0.8, validator=validators.le(0))
    """The running averages forget by 1 - step^beta2_decay."""

    eps: tuple[float, float] | None = None
    """The smallest root of a second moment, and the smallest size of a parameter. Absent: the format's step at 1, and
    1e-3."""

    d: float = attrs.field(default=1.0, validator=validators.ge(1))
    """Updates of a larger root mean square are scaled down to it."""

    weight_decay: float = _number(0.0)
    """Fraction of the parameter, times the learning rate, that each step takes away."""


@attrs.frozen(kw_only=True)
class Muon(_Climbing):
    """Muon (Jordan et al., 2024) for hidden matrices, AdamW for all else."""

    lr: float = _number(1e-3)
    """Learning rate at the peak of the schedule."""

    weight_decay: float = _number(0.1)
    """Fraction of the parameter, times the learning rate, that each step takes away."""

    momentum: float = attrs.field(default=0.95, validator=[validators.ge(0), validators.lt(1)])
    """Decay of the momentum, per step."""

    nesterov: bool = True
    """Look ahead along the momentum."""

    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """Of the quintic that an iteration applies to the singular values."""

    ns_steps: int = _count(5)
    """Iterations of Newton-Schulz."""

    ns_dtype: Literal["bf16", "fp32"] = "bf16"
    """The format of the iterations."""

    eps: float = _number(1e-7)
    """The norm by which a matrix is divided before the iterations is at least this."""

    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    """What a matrix's learning rate is multiplied by: max(1, rows/columns)^0.5, or 0.2 max(rows, columns)^0.5, which
    makes updates as large as AdamW's (Liu et al., 2025)."""

    betas: tuple[float, float] = _betas(0.95)
    """AdamW's decays."""

    adamw_eps: float = _number(1e-8)
    """AdamW's eps."""

    adamw_lr: float | None = _perhaps()
    """AdamW's learning rate. Absent: ``lr``."""

    adamw_weight_decay: float | None = _perhaps()
    """AdamW's weight decay. Absent: ``weight_decay``."""

    adamw_names: tuple[str, ...] = (
        "*embed*",
        "*wte*",
        "*wpe*",
        "*lm_head*",
        "head.*",
        "*.head.*",
        "output.*",
        "classifier.*",
        "*.classifier.*",
    )
    """Patterns of the names of matrices that AdamW updates: embeddings and heads. ``[]``: none."""


@attrs.frozen(kw_only=True)
class Adam8bit(Adam):
    """Adam with moments of 8 bits (Dettmers et al., 2021)."""


@attrs.frozen(kw_only=True)
class AdamW8bit(AdamW):
    """AdamW with moments of 8 bits (Dettmers et al., 2021)."""


@attrs.frozen(kw_only=True)
class OneBitAdam(Adam):
    """The optimizer's part of 1-bit Adam (Tang et al., 2021); weight decay is decoupled."""

    weight_decay: float = _number(0.0)
    """Fraction of the parameter, times the learning rate, that each step takes away."""

    freeze_step: int = _count(100_000)
    """The last step that changes the second moment: 15 to 20 % of all steps."""


@attrs.frozen(kw_only=True)
class ZeroOneAdam(Adam):
    """The optimizer's part of 0/1 Adam (Lu et al., 2022); weight decay is decoupled."""

    weight_decay: float = _number(0.0)
    """Fraction of the parameter, times the learning rate, that each step takes away."""

    var_freeze_step: int = _count(100_000)
    """The last step that may change the second moment."""

    var_update_scaler: int = _count(16)
    """Changes of the second moment before their distance doubles."""

    local_step_scaler: int = _count(32_678)
    """Steps, after the second moment is frozen, before the distance of synchronizations doubles."""

    local_step_clipper: int = _count(16)
    """The largest distance of synchronizations, a power of 2."""


@attrs.frozen(kw_only=True)
class OneBitLamb(Lamb):
    """The optimizer's part of 1-bit LAMB (Li et al., 2021)."""

    min_ratio: float = _number(0.01)
    """The smallest trust ratio before the second moment is frozen."""

    freeze_step: int = _count(100_000)
    """The last step that changes the second moment that divides."""

    coeff_beta: float = attrs.field(default=0.9, validator=[validators.ge(0), validators.lt(1)])
    """Decay of the running average of each tensor's trust ratio, per step."""

    factor_min: float = attrs.field(default=0.5, validator=[validators.gt(0), finite])
    """The smallest factor on that average after ``freeze_step``."""

    factor_max: float = _number(4.0)
    """The largest factor on it."""

    factor_threshold: float = _number(0.1)
    """How much of itself the factor may change by in a step."""


@attrs.frozen(kw_only=True)
class ScheduleFreeAdamW(_Climbing):
    """Schedule-free AdamW (Defazio et al., 2024); leave ``[scheduler]`` out."""

    lr: float = _number(2.5e-3)
    """Learning rate; it does not decay."""

    betas: tuple[float, float] = _betas()
    """Weight of the average in what is trained (above 0), and decay of the squared gradient's average per step."""

    eps: float = _number(1e-8)
    """Added to the denominator, so that a parameter without gradient does not divide by zero."""

    weight_decay: float = _number(0.0)
    """Fraction of the parameter, times the learning rate, that each step takes away."""

    warmup_steps: int = _count(0, least=0)
    """Steps over which the learning rate rises from zero."""

    r: float = attrs.field(default=0.0, validator=finite)
    """Steps weigh as their number to this power in the average."""

    weight_lr_power: float = _number(2.0)
    """And as the largest learning rate so far to this one."""


OPTIONS: dict[str, type[Any]] = {
    "adam": Adam,
    "adamw": AdamW,
    "sgd": SGD,
    "adagrad": Adagrad,
    "lion": Lion,
    "lamb": Lamb,
    "adafactor": Adafactor,
    "muon": Muon,
    "adam8bit": Adam8bit,
    "adamw8bit": AdamW8bit,
    "onebit_adam": OneBitAdam,
    "zero_one_adam": ZeroOneAdam,
    "onebit_lamb": OneBitLamb,
    "schedule_free_adamw": ScheduleFreeAdamW,
}
"""Name in the configuration to the options of the optimizer of that name."""
