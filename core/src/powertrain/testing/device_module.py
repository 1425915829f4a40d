"""A stand-in for torch's module of a device, for tests of accelerators without the device.

It keeps the books a real one keeps (contexts, memory, generators, streams)
and a log of calls in order, and computes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch


class FakeStream:
    """A queue that notes what was asked of it in its module's log."""

    def __init__(self, module: FakeDeviceModule, name: str, device: int) -> None:
        self.module = module
        self.name = name
        self.device = device

    def wait_event(self, event: FakeEvent) -> None:
        """Note that this stream waits for what ``event`` was recorded on."""
        self.module.calls.append(f"{self.name} waits for {event.source}")


class FakeEvent:
    """An event that knows the stream it was recorded on."""

    def __init__(self, module: FakeDeviceModule) -> None:
        self.module = module
        self.source: str | None = None

    def record(self, stream: FakeStream) -> None:
        """Note the stream."""
        self.source = stream.name
        self.module.calls.append(f"record {stream.name}")

    def synchronize(self) -> None:
        """Note that the host waits for what this event was recorded on."""
        self.module.calls.append(f"host waits for {self.source}")


class FakeDeviceModule:
    """Offers what ``powertrain.roles.torch_device`` asks of a device module.

    Args:
        devices: how many devices there are.
        total: bytes of memory on each.
        bf16: whether the devices compute in bfloat16.
        complaint: a warning that counting devices emits.
        facts: further properties of each device.

    Attributes:
        contexts: the devices on which a context was created.
        calls: what was asked, in order.
        held: bytes that tensors hold, by device.
        cached: bytes that the allocator keeps beside them, by device.
    """

    def __init__(
        self,
        devices: int = 2,
        *,
        total: int = 16 << 30,
        bf16: bool = True,
        complaint: str | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.total = total
        self.bf16 = bf16
        self.complaint = complaint
        self.facts = {"name": "Fake 1000", "total_memory": total} | (facts or {})
        self.contexts: set[int] = set()
        self.calls: list[str] = []
        self.held = dict.fromkeys(range(devices), 0)
        self.cached = dict.fromkeys(range(devices), 0)
        self._peak = dict.fromkeys(range(devices), 0)
        self._current = 0
        self._generators = [torch.Generator() for _ in range(devices)]
        self._streams = [FakeStream(self, f"default{index}", index) for index in range(devices)]

    # --- for the test ---------------------------------------------------------------

    def allocate(self, index: int, size: int) -> None:
        """Let tensors on device ``index`` hold ``size`` bytes more."""
        self._context(index)
        self.held[index] += size
        self._peak[index] = max(self._peak[index], self.held[index])

    def release(self, index: int, size: int) -> None:
        """Let go of ``size`` bytes, which the allocator keeps."""
        self.held[index] -= size
        self.cached[index] += size

    def draw(self, index: int) -> list[float]:
        """Return the next random numbers of device ``index``."""
        return torch.rand(4, generator=self._generators[index]).tolist()

    # --- what a device module offers ---------------------------------------------------

    def device_count(self) -> int:
        """Return the number of devices; needs no context."""
        if self.complaint:
            warnings.warn(self.complaint, stacklevel=2)
        return len(self.held)

    def is_initialized(self) -> bool:
        """Return whether any context exists."""
        return bool(self.contexts)

    def current_device(self) -> int:
        """Return the current device."""
        return self._current

    def set_device(self, device: torch.device | int) -> None:
        """Make ``device`` current."""
        self._current = self._context(device)
        self.calls.append(f"set_device {self._current}")

    @contextmanager
    def device(self, device: torch.device | int) -> Iterator[None]:
        """Make ``device`` current within a block."""
        before, self._current = self._current, self._context(device)
        try:
            yield
        finally:
            self._current = before

    def synchronize(self, device: torch.device | int) -> None:
        """Note the call."""
        self.calls.append(f"synchronize {self._context(device)}")

    def mem_get_info(self, device: torch.device | int) -> tuple[int, int]:
        """Return (free, total) as the driver sees it."""
        index = self._context(device)
        return self.total - self.held[index] - self.cached[index], self.total

    def memory_allocated(self, device: torch.device | int) -> int:
        """Return the bytes that tensors hold."""
        return self.held[self._index(device)]

    def memory_reserved(self, device: torch.device | int) -> int:
        """Return the bytes that the allocator holds."""
        return self.held[self._index(device)] + self.cached[self._index(device)]

    def max_memory_allocated(self, device: torch.device | int) -> int:
        """Return the most bytes that tensors held."""
        return self._peak[self._index(device)]

    def reset_peak_memory_stats(self, device: torch.device | int) -> None:
        """Start the peak anew; like torch, only once there is an allocator."""
        if not self.contexts:
            raise RuntimeError("the allocator is not initialized")
        self._peak[self._index(device)] = self.held[self._index(device)]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        """Return whether bfloat16 works; emulation always does."""
        self._context(self._current)
        return self.bf16 or including_emulation

    def manual_seed(self, seed: int) -> None:
        """Seed the current device's generator."""
        self._generators[self._current].manual_seed(seed)

    def get_rng_state(self, device: torch.device | int) -> torch.Tensor:
        """Return the state of a device's generator."""
        return self._generators[self._context(device)].get_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device | int) -> None:
        """Set the state of a device's generator."""
        self._generators[self._context(device)].set_state(state)

    def get_device_properties(self, device: torch.device | int) -> SimpleNamespace:
        """Return a device's facts."""
        self._context(device)
        return SimpleNamespace(**self.facts)

    def current_stream(self) -> FakeStream:
        """Return the stream that the current device's work is queued on."""
        return self._streams[self._current]

    def Stream(self, device: torch.device | int) -> FakeStream:  # noqa: N802 - torch's name
        """Make a stream on ``device``."""
        index = self._context(device)
        made = sum(call.startswith("make side") for call in self.calls)
        self.calls.append(f"make side{made}")
        return FakeStream(self, f"side{made}", index)

    def Event(self) -> FakeEvent:  # noqa: N802 - torch's name
        """Make an event."""
        return FakeEvent(self)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        """Make ``stream`` current within a block."""
        before, self._streams[stream.device] = self._streams[stream.device], stream
        self.calls.append(f"enter {stream.name}")
        try:
            yield
        finally:
            self._streams[stream.device] = before
            self.calls.append(f"leave {stream.name}")

    def _index(self, device: torch.device | int) -> int:
        index = device if isinstance(device, int) else device.index
        if index not in self.held:
            raise RuntimeError("invalid device ordinal")
        return index

    def _context(self, device: torch.device | int) -> int:
        index = self._index(device)
        self.contexts.add(index)
        return index
