"""How long collectives take: on the host by its clock, on a device by its events."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from powertrain.roles.communicator import Handle


class Sums(Protocol):
    """Where times are added up, in seconds."""

    seconds: float
    exposed: float


class HostTimed:
    """A handle whose times are the host's.

    Args:
        inner: the collective.
        sums: where its times go.
    """

    __slots__ = ("_inner", "_started", "_sums")

    def __init__(self, inner: Handle, sums: Sums, started: float) -> None:
        self._inner = inner
        self._sums: Sums | None = sums
        self._started = started

    @property
    def silent(self) -> bool:
        """Whether only waiting tells that it is over."""
        return bool(getattr(self._inner, "silent", False))

    def wait(self) -> None:
        """Wait, and add up the time of the collective and of the waiting."""
        sums = self._sums
        if sums is None:
            self._inner.wait()
            return
        began = time.perf_counter()
        self._inner.wait()
        ended = time.perf_counter()
        self._sums = None
        elapsed = getattr(self._inner, "elapsed", None)  # of transports that know when it ended
        sums.seconds += ended - self._started if elapsed is None else elapsed()
        sums.exposed += ended - began

    def done(self) -> bool:
        """Return whether ``wait`` would return at once."""
        return self._inner.done()


class DeviceClock:
    """Times of a device, which are known only when it has come that far.

    Args:
        device: whose.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: list[tuple[Sums, Any, Any, Any]] = []

    def event(self) -> Any:
        """Return an event at this point of the current queue."""
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def note(self, sums: Sums, issued: Any, began: Any, ended: Any) -> None:
        """Remember a collective's events; those that are over are added up."""
        self._pending.append((sums, issued, began, ended))
        while self._pending and self._pending[0][3].query():
            self._add(*self._pending.pop(0))

    def settle(self) -> None:
        """Wait for the device, and add up everything."""
        for sums, issued, began, ended in self._pending:
            ended.synchronize()
            self._add(sums, issued, began, ended)
        self._pending.clear()

    @staticmethod
    def _add(sums: Sums, issued: Any, began: Any, ended: Any) -> None:
        sums.seconds += issued.elapsed_time(ended) / 1e3
        sums.exposed += began.elapsed_time(ended) / 1e3


class DeviceTimed:
    """A handle whose times are a device's: its current queue waits, not the host.

    Args:
        inner: the collective.
        sums: where its times go.
        clock: of the device.
    """

    __slots__ = ("_clock", "_inner", "_issued", "_sums")

    def __init__(self, inner: Handle, sums: Sums, clock: DeviceClock, issued: Any) -> None:
        self._inner = inner
        self._sums: Sums | None = sums
        self._clock = clock
        self._issued = issued

    @property
    def silent(self) -> bool:
        """Whether only waiting tells that it is over."""
        return bool(getattr(self._inner, "silent", False))

    def wait(self) -> None:
        """Let the device wait, between two events."""
        sums, self._sums = self._sums, None
        if sums is None:
            self._inner.wait()
            return
        began = self._clock.event()
        self._inner.wait()
        self._clock.note(sums, self._issued, began, self._clock.event())

    def done(self) -> bool:
        """Return whether ``wait`` would return at once."""
        return self._inner.done()
