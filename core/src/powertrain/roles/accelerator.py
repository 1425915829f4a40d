"""The accelerator role: what computes.

Ten methods are required; everything else is optional, has a default here, and
is announced in ``capabilities`` so that callers can ask before they use it.
Adding an optional method to this class breaks no plugin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import attrs
import torch


@attrs.frozen
class Memory:
    """A device's memory, in bytes.

    Attributes:
        used: held by this process now.
        peak: the most held by this process since the last reset.
        total: what the device has.
        free: what could still be allocated.
    """

    used: int
    peak: int
    total: int
    free: int


class Accelerator(ABC):
    """One kind of device, as one process sees it.

    Attributes:
        name: what ``[accelerator] use`` calls it.
        device_type: the ``torch.device`` type of its tensors.
    """

    name: ClassVar[str]
    device_type: ClassVar[str]

    @abstractmethod
    def device_count(self) -> int:
        """Return how many devices this host offers, creating no context on any."""

    @abstractmethod
    def device(self, index: int) -> torch.device:
        """Return the device that local rank ``index`` computes on.

        Raises:
            AcceleratorError: there is no such device.
        """

    @abstractmethod
    def activate(self, device: torch.device) -> None:
        """Make ``device`` the current one of this thread."""

    @abstractmethod
    def synchronize(self, device: torch.device) -> None:
        """Wait until all work queued on ``device`` is done."""

    @abstractmethod
    def memory(self, device: torch.device) -> Memory:
        """Return the memory of ``device``."""

    @abstractmethod
    def reset_peak_memory(self, device: torch.device) -> None:
        """Start ``memory().peak`` anew from what is held now."""

    @abstractmethod
    def dtypes(self) -> frozenset[torch.dtype]:
        """Return the floating-point types it can train in."""

    @abstractmethod
    def seed(self, value: int, device: torch.device) -> None:
        """Seed the device's random number generator."""

    @abstractmethod
    def rng_state(self, device: torch.device) -> torch.Tensor:
        """Return the generator's state as a uint8 tensor on the host."""

    @abstractmethod
    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Continue from a state that ``rng_state`` returned."""

    # --- optional: overridden together with a name in ``capabilities`` ---

    @property
    def capabilities(self) -> frozenset[str]:
        """Return which optional parts work: ``streams``, ``pinned``, ``graphs``, ``kernels``."""
        return frozenset()

    def backends(self) -> tuple[str, ...]:
        """Return the collective libraries that reach its memory, best first."""
        return ("gloo",)

    def stream(self, device: torch.device) -> Any:
        """Return a new queue of work on ``device`` (capability ``streams``)."""
        return None

    def use_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Queue the work of a ``with`` block on ``stream`` (capability ``streams``)."""
        return nullcontext()

    def record(self, stream: Any) -> Any:
        """Return an event that fires when what is queued on ``stream`` is done (``streams``).

        None stands for the current stream, here and in ``wait``.
        """
        return None

    def wait(self, stream: Any, event: Any) -> None:
        """Make later work on ``stream`` wait for ``event`` (capability ``streams``)."""

    def finish(self, event: Any) -> None:
        """Let the host wait until ``event`` fires (capability ``streams``)."""

    def share(self, tensor: torch.Tensor, stream: Any) -> None:
        """Keep the memory of ``tensor``, once freed, from new use until ``stream`` is done with it (``streams``).

        For a stream other than the one that was current when it was allocated. None stands for the current one.
        """

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return host memory holding ``tensor`` from which copies run beside compute (``pinned``)."""
        return tensor

    def release_unused(self, device: torch.device) -> None:
        """Give memory back that the allocator holds and no tensor does; not for inner loops."""

    def kernel(self, name: str) -> Callable[..., Any] | None:
        """Return the device's own kernel called ``name``, or None for the reference (``kernels``)."""
        return None

    def describe(self) -> dict[str, str]:
        """Return facts for people: the device's name, driver, versions."""
        return {}
