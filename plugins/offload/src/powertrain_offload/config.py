"""The ``[offload]`` table."""

from __future__ import annotations

from typing import Any, Literal

import attrs
from attrs import validators

Place = Literal["device", "host", "nvme"]

MIB = 2**20


def _whole_pages(instance: Any, attribute: attrs.Attribute[int], value: int) -> None:
    if value < 4096 or value % 4096:
        raise ValueError("expected a multiple of 4096 from 4096 up")


@attrs.frozen(kw_only=True)
class OffloadConfig:
    """Where training state rests between uses: on the device, in the host's memory, or on disks."""

    optimizer: Place = "device"
    """Masters and optimizer state. "host": updated by the processor where they rest. "nvme": they come to the host's
    memory chunk by chunk, are updated and go back. Default "device"."""

    gradients: Place = "device"
    """Mean gradients, from their reduction to the update; from stage 2 on. Default "device"."""

    parameters: Place = "device"
    """This rank's slices of parameters, from which units are gathered; at stage 3. Default "device"."""

    activations: Place = "device"
    """What backward needs of forward. Default "device"."""

    path: str | list[str] | None = attrs.field(default=None)
    """For "nvme": a directory on a local disk; several, on different disks, share the bytes. Nothing stays there
    when the run is over, however it ends. Needed as soon as something rests on "nvme"."""

    ratio: float = attrs.field(default=1.0, validator=[validators.gt(0), validators.le(1)])
    """The share of the optimizer's state that leaves the device; the rest stays (Twin-Flow). Default 1.0."""

    delayed: bool = False
    """Let the update of the last units go on during the next forward pass, which then uses their parameters of the
    step before. Which units is told at the start. Changes the numbers. Default false."""

    engine: Literal["auto", "uring", "direct", "threads"] = "auto"
    """What moves bytes to and from disks. "auto": the first that works of io_uring, threads in C++ and threads in
    Python. `powertrain io bench` tells which is fastest here. Default "auto"."""

    block: int = attrs.field(default=MIB, validator=_whole_pages)
    """Bytes of one request to a disk, a multiple of 4096. Default 1 MiB."""

    depth: int = attrs.field(default=128, validator=validators.ge(1))
    """Requests under way at once. Default 128."""

    threads: int = attrs.field(default=8, validator=validators.ge(1))
    """Threads of the engines "direct" and "threads". Default 8."""

    grain: int = attrs.field(default=32 * MIB, validator=_whole_pages)
    """Bytes of masters that are fetched, updated and stored at a time, where the optimizer's rule allows it. About ten
    times as much is in memory at once. Default 32 MiB."""

    buffers: int = attrs.field(default=1024 * MIB, validator=validators.ge(MIB))
    """Bytes of host memory for transfers that are kept for the next one; what is on loan beyond that is given back.
    Default 1 GiB."""

    @path.validator
    def _some(self, attribute: attrs.Attribute[Any], value: str | list[str] | None) -> None:
        if value is not None and (not value or (isinstance(value, list) and not all(value))):
            raise ValueError("expected a directory, or a list of directories")

    def __attrs_post_init__(self) -> None:
        if "nvme" in self.places and self.path is None:
            wanted = next(name for name in CATEGORIES if getattr(self, name) == "nvme")
            raise ValueError(f'{wanted} = "nvme" needs path: a directory on a local disk')
        if self.ratio != 1.0 and self.optimizer == "device":
            raise ValueError('ratio needs optimizer = "host" or "nvme": it says how much of that leaves the device')
        if self.delayed and self.optimizer == "device":
            raise ValueError('delayed needs optimizer = "host" or "nvme": only their update runs beside the device')

    @property
    def places(self) -> set[Place]:
        """Where something rests."""
        return {getattr(self, name) for name in CATEGORIES}

    @property
    def paths(self) -> list[str]:
        """The directories."""
        return [self.path] if isinstance(self.path, str) else list(self.path or ())


CATEGORIES = ("optimizer", "gradients", "parameters", "activations")
"""The keys that say where something rests."""
