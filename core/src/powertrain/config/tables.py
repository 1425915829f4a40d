"""The core's own tables: one attrs class each, every key with its meaning.

Field docstrings (the string below a field) are the reference documentation:
unit, what the default means, what a value costs.
"""

from __future__ import annotations

from typing import Any, Literal

import attrs
from attrs import validators

from powertrain.config.constraints import finite, positive

LONGEST_TIMEOUT = 30 * 24 * 3600
"""Seconds, 30 days: libraries below count in milliseconds or nanoseconds, and larger numbers overflow them."""


@attrs.frozen(kw_only=True)
class Run:
    """The run as a whole."""

    seed: int = attrs.field(default=0, validator=[validators.ge(0), validators.lt(2**63)])
    """Seeds every random generator; rank r adds r where ranks must differ. Default 0."""

    output: str = "runs"
    """Directory for what the run leaves behind (checkpoints, metrics), relative to the working directory."""


@attrs.frozen(kw_only=True)
class AcceleratorTable:
    """What computes."""

    use: str | None = None
    """Name of the accelerator; absent, each installed accelerator plugin is asked whether it is available."""


@attrs.frozen(kw_only=True)
class CommunicatorTable:
    """What connects the ranks."""

    use: str | None = None
    """Name of the transport; absent, the one that suits the accelerator."""

    timeout: float = attrs.field(default=600.0, validator=[validators.gt(0), validators.le(LONGEST_TIMEOUT)])
    """Seconds after which a collective that has not finished ends the run with a report. Default 600."""


@attrs.frozen(kw_only=True)
class Batch:
    """How many samples make one optimizer step: total = micro x accumulation x data ranks."""

    micro: int | None = attrs.field(default=None, validator=validators.optional(validators.ge(1)))
    """Samples in one forward and backward pass on one rank. Absent: derived, or 1."""

    accumulation: int | None = attrs.field(default=None, validator=validators.optional(validators.ge(1)))
    """Micro-batches whose gradients are averaged before an update. Absent: derived, or 1."""

    total: int | None = attrs.field(default=None, validator=validators.optional(validators.ge(1)))
    """Samples in one optimizer step over all ranks. Absent: derived."""


@attrs.frozen(kw_only=True)
class Optimizer:
    """What updates the parameters.

    Further keys are the options of the optimizer that ``name`` chooses.
    """

    name: str = "adamw"
    """One of the named optimizers, or the dotted path of a ``torch.optim.Optimizer`` class."""

    clip: float | None = attrs.field(default=None, validator=validators.optional([validators.gt(0), finite]))
    """Largest global norm of the gradients; larger ones are scaled down to it. Absent: no clipping."""

    options: dict[str, Any] = attrs.field(factory=dict, metadata={"open": "optimizer"})
    """Filled from the remaining keys of the table."""


@attrs.frozen(kw_only=True)
class Scheduler:
    """How the learning rate changes from step to step.

    Further keys are the options of the schedule that ``name`` chooses.
    """

    name: str = "constant"
    """One of the named schedules, or the dotted path of a ``torch.optim.lr_scheduler`` class."""

    options: dict[str, Any] = attrs.field(factory=dict, metadata={"open": "scheduler"})
    """Filled from the remaining keys of the table."""


Format = Literal["fp32", "bf16", "fp16"]


@attrs.frozen(kw_only=True)
class Precision:
    """Number formats: what computes, what is kept, what is sent."""

    compute: Format = "fp32"
    """Format of parameters and activations in forward and backward. Default fp32."""

    master: Format | None = None
    """Format of the parameters that the optimizer updates. Absent: fp32."""

    reduce: Format | None = None
    """Format in which gradients are sent and averaged over ranks. Absent: fp32."""

    accumulate: Format | None = None
    """Format in which the gradients of several micro-batches add up. Absent: that of ``reduce``."""

    optimizer: Literal["fp32", "bf16"] | None = None
    """Format in which optimizer state is kept between steps; bf16 halves its memory. What shards the optimizer
    converts it unit by unit; replicated, it needs an optimizer of ``[optimizers]``. Absent: that of ``master``."""

    autocast: bool = False
    """Keep the model in ``master`` and run it under torch.autocast(compute) instead of converting it."""

    loss_scale: Literal["dynamic"] | float | None = attrs.field(default=None, validator=[positive, finite])
    """Factor on the loss that keeps small gradients above zero. Absent: dynamic for fp16, 1 otherwise."""


@attrs.frozen(kw_only=True)
class Checkpoint:
    """Where and how often state is saved."""

    directory: str | None = None
    """Directory of the checkpoints. Absent: ``checkpoints`` under ``[run] output``."""

    every: int | None = attrs.field(default=None, validator=validators.optional(validators.ge(1)))
    """Optimizer steps between automatic saves. Absent: only ``engine.save_checkpoint`` saves."""

    keep_last: int | None = attrs.field(default=None, validator=validators.optional(validators.ge(1)))
    """Checkpoints named ``step-<number>`` that are kept; older ones are deleted. Absent: all."""

    asynchronous: bool = False
    """Write in the background while training goes on; costs a copy of the state in host memory."""


@attrs.frozen(kw_only=True)
class Plugins:
    """Which plugins take part, beyond those that have a section."""

    require: list[str] = attrs.field(factory=list)
    """Plugins that must be installed and are loaded, as requirements ("powertrain-zero>=0.1,<1" or "zero")."""

    disable: list[str] = attrs.field(factory=list)
    """Plugins that are not loaded, whatever else names them."""

    pin: dict[str, str] = attrs.field(factory=dict)
    """Choices where two plugins compete: hook or plugin name to plugin or distribution name."""


CORE_TABLES: dict[str, type[Any]] = {
    "run": Run,
    "accelerator": AcceleratorTable,
    "communicator": CommunicatorTable,
    "batch": Batch,
    "optimizer": Optimizer,
    "scheduler": Scheduler,
    "precision": Precision,
    "checkpoint": Checkpoint,
    "plugins": Plugins,
}
"""Section name to class; every other section belongs to the plugin of its name."""
