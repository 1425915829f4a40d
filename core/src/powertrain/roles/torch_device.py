"""An accelerator over any device that torch has a module for.

``torch.get_device_module(device_type)`` returns the module of a device type,
built into torch or registered from outside it. These modules agree on names,
so one class serves them all; a plugin adds the facts of its hardware.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch

from powertrain.errors import AcceleratorError
from powertrain.plugin import Probe
from powertrain.roles.accelerator import Accelerator, Memory
from powertrain.torch_build import torch_build


class TorchDeviceAccelerator(Accelerator):
    """Fulfils the accelerator role through torch's own module of a device type.

    A subclass sets ``name`` and ``device_type``. The module must offer
    ``device_count``, ``is_initialized``, ``set_device``, ``device``,
    ``synchronize``, ``mem_get_info``, ``memory_allocated``,
    ``memory_reserved``, ``max_memory_allocated``, ``reset_peak_memory_stats``,
    ``is_bf16_supported``, ``manual_seed``, ``get_rng_state``,
    ``set_rng_state``, ``get_device_properties``, ``Stream``, ``Event``,
    ``stream`` and ``current_stream``, with the meaning they have in torch's
    documentation.

    Attributes:
        build: an attribute of ``torch.version`` without which there is no
            device, where several builds of torch share one module; None: any
            build will do.

    Args:
        module: what to call in place of ``torch.get_device_module(device_type)``.

    Raises:
        AcceleratorError: torch has no module for this device type.
    """

    build: ClassVar[str | None] = None

    def __init__(self, module: Any = None) -> None:
        if module is None:
            try:
                module = torch.get_device_module(self.device_type)
            except RuntimeError as error:
                raise AcceleratorError(
                    f"torch has no device module for {self.device_type!r}",
                    found=f"torch {torch.__version__}",
                    remedy="install the package that registers it with torch",
                ) from error
        self.module = module

    def probe(self) -> Probe:
        """Say how many devices torch sees, and what its driver layer complained about; makes no context."""
        count, complaint = self._count()
        if count:
            return Probe(True, f"{count} device{'s' if count > 1 else ''}")
        return Probe(False, complaint or "torch sees no device: no driver, or none made visible to this process")

    def device_count(self) -> int:
        """Return how many devices torch sees; ``probe`` says why there are none."""
        return self._count()[0]

    def _count(self) -> tuple[int, str]:
        """Return the number of devices, and why there are none: what torch warned of while it counted."""
        if self.build is not None and torch_build(self.build) is None:
            return 0, f"this torch was built without {self.build}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            count = int(self.module.device_count())
        return count, "; ".join(str(warning.message).splitlines()[0] for warning in caught)

    def device(self, index: int) -> torch.device:
        """Return the device of local rank ``index``: one rank, one device."""
        count = self.device_count()
        if count == 0:
            raise AcceleratorError(
                f"there is no {self.name} device on this host",
                found=self.probe().reason,
                remedy="mend what is missing, or choose another `[accelerator] use`",
            )
        if not 0 <= index < count:
            raise AcceleratorError(
                f"local rank {index} has no {self.name} device of its own",
                expected=f"a local rank from 0 to {count - 1}",
                found=f"{count} device{'s' if count > 1 else ''} on this host",
                remedy=f"start one rank a device: `powertrain launch --nproc {count} ...`; where the launcher "
                "shows each rank only some devices, let every rank see all of its host's",
            )
        return torch.device(self.device_type, index)

    def activate(self, device: torch.device) -> None:
        """Make ``device`` the current one of this thread; creates its context."""
        self.module.set_device(device)

    def synchronize(self, device: torch.device) -> None:
        """Wait for every stream of ``device``."""
        self.module.synchronize(device)

    def memory(self, device: torch.device) -> Memory:
        """Return the memory of ``device``.

        ``used`` and ``peak`` count what this process's tensors hold. ``free``
        is what the driver has left plus what torch's allocator has cached.
        """
        free, total = self.module.mem_get_info(device)
        used = self.module.memory_allocated(device)
        cached = self.module.memory_reserved(device) - used
        return Memory(used=used, peak=self.module.max_memory_allocated(device), total=total, free=free + cached)

    def reset_peak_memory(self, device: torch.device) -> None:
        """Start the allocator's peak anew from what tensors hold now."""
        # Before the first use of the device there is no allocator to reset, and torch refuses.
        if self.module.is_initialized():
            self.module.reset_peak_memory_stats(device)

    def dtypes(self) -> frozenset[torch.dtype]:
        """Return fp32, fp16 and fp64, and bf16 where the current device computes in it."""
        common = {torch.float32, torch.float16, torch.float64}
        return frozenset(common | {torch.bfloat16} if self.has_bf16() else common)

    def has_bf16(self) -> bool:
        """Return whether the current device computes in bfloat16."""
        return bool(self.module.is_bf16_supported())

    def seed(self, value: int, device: torch.device) -> None:
        """Seed the generator of ``device`` alone."""
        with self.module.device(device):
            self.module.manual_seed(value)

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """Return the state of the generator of ``device`` (uint8, on the host)."""
        state: torch.Tensor = self.module.get_rng_state(device)
        return state

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Continue the generator of ``device`` from ``state``."""
        self.module.set_rng_state(state, device)

    # --- optional parts -----------------------------------------------------------

    @property
    def capabilities(self) -> frozenset[str]:
        """Return ``streams`` and ``pinned``."""
        return frozenset({"streams", "pinned"})

    def stream(self, device: torch.device) -> Any:
        """Return a new stream of ``device``."""
        return self.module.Stream(device=device)

    def use_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Make ``stream`` the current one within a ``with`` block."""
        context: AbstractContextManager[Any] = self.module.stream(stream)
        return context

    def record(self, stream: Any) -> Any:
        """Return an event recorded on ``stream``; None means the current stream."""
        event = self.module.Event()
        event.record(self.module.current_stream() if stream is None else stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """Make later work on ``stream`` wait for ``event``; None means the current stream."""
        (self.module.current_stream() if stream is None else stream).wait_event(event)

    def finish(self, event: Any) -> None:
        """Let the host wait for an event."""
        if event is not None:
            event.synchronize()

    def share(self, tensor: torch.Tensor, stream: Any) -> None:
        """Tell the allocator that ``stream`` uses the memory of ``tensor`` too; None means the current stream."""
        tensor.record_stream(self.module.current_stream() if stream is None else stream)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return page-locked host memory that holds ``tensor``; itself if it is that already."""
        return tensor.pin_memory()

    def release_unused(self, device: torch.device) -> None:
        """Give the allocator's cached memory back, where the module can."""
        empty_cache = getattr(self.module, "empty_cache", None)
        if empty_cache is not None and self.module.is_initialized():
            empty_cache()

    def describe(self) -> dict[str, str]:
        """Return the number of devices, and the first one's name and memory."""
        count = self.device_count()
        facts = {"devices": str(count)}
        if count:
            properties = self.module.get_device_properties(torch.device(self.device_type, 0))
            facts["name"] = properties.name
            facts["memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
        return facts
