"""A device that does its work as late, or as early, as its queues allow: what is not ordered goes wrong on it.

Its memory is the host's. Copies that are issued without waiting, and what ``compute`` is given, are put into the
queue of the current stream, and done when somebody waits for them, or when ``drift`` lets some streams go on. It
keeps the books of an allocator that gives memory out again, on the stream that it was allocated on, as soon as it is
freed: what may then be touched by two at once is written down in ``races``.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from powertrain.testing.null import NullHost


class Stream:
    """A queue of work; it has issued and done so many pieces."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: deque[Callable[[], None]] = deque()
        self.issued = self.done = 0

    def put(self, work: Callable[[], None]) -> None:
        self.queue.append(work)
        self.issued += 1

    def run(self, until: int) -> None:
        while self.done < until:
            work = self.queue.popleft()
            work()
            self.done += 1


class Event:
    """A place in a stream's queue."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.place = stream, stream.issued


class Block:
    """Memory that was allocated: on which stream, when, who else may use it, and what is queued that touches it."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.place = stream, stream.issued
        self.shared: set[Stream] = {stream}
        self.users: list[tuple[Stream, int]] = []


class LazyDevice(NullHost):
    """An accelerator with streams and page-locked memory.

    Attributes:
        races: what could have gone wrong.
        host_waits: how often the host waited for an event, and for everything.
        pinned: the sizes of what was page-locked.
    """

    name = "lazy"

    def __init__(self) -> None:
        super().__init__()
        self.default = Stream("default")
        self.streams = [self.default]
        self.current = self.default
        self.blocks: dict[int, Block] = {}
        self.races: list[str] = []
        self.host_waits = {"event": 0, "everything": 0}
        self.pinned: list[int] = []

    @property
    def capabilities(self) -> frozenset[str]:
        return frozenset({"streams", "pinned"})

    # --- the accelerator -------------------------------------------------------------------

    def stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(f"side{len(self.streams)}"))
        return self.streams[-1]

    @contextmanager
    def use_stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def record(self, stream: Stream | None) -> Event:
        return Event(stream or self.current)

    def wait(self, stream: Stream | None, event: Event) -> None:
        (stream or self.current).put(lambda: event.stream.run(event.place))

    def finish(self, event: Event) -> None:
        self.host_waits["event"] += 1
        event.stream.run(event.place)

    def share(self, tensor: torch.Tensor, stream: Stream | None) -> None:
        block = self.blocks.get(tensor.untyped_storage().data_ptr())
        if block is not None:  # no bytes are no memory
            block.shared.add(stream or self.current)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.append(tensor.numel())
        return tensor.clone()

    def synchronize(self, device: torch.device) -> None:
        self.host_waits["everything"] += 1
        self.everything()

    # --- for the test ----------------------------------------------------------------------

    def everything(self) -> None:
        """Do all that is queued."""
        for stream in self.streams:
            stream.run(stream.issued)

    def drift(self, draw: random.Random) -> None:
        """Let some streams do some of their work."""
        for stream in draw.sample(self.streams, len(self.streams)):
            stream.run(draw.randint(stream.done, stream.issued))

    def compute(self, tensors: Sequence[torch.Tensor], work: Callable[..., object]) -> None:
        """Queue ``work(*tensors)`` on the current stream."""
        same = [self.alias(tensor) for tensor in tensors]
        self.queue(tensors, lambda: work(*same))

    def copying(self) -> TorchDispatchMode:
        """Take copies and allocations within a block for the device's."""
        return _Copies(self)

    # --- queues and memory -----------------------------------------------------------------

    @staticmethod
    def alias(tensor: torch.Tensor) -> torch.Tensor:
        """Return another tensor of the same memory, which does not keep the first one."""
        return torch.empty(0, dtype=tensor.dtype).set_(
            tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )

    def queue(self, tensors: Sequence[torch.Tensor], work: Callable[[], object]) -> None:
        stream = self.current
        found = [self.blocks.get(tensor.untyped_storage().data_ptr()) for tensor in tensors]
        blocks = [block for block in found if block is not None]

        def checked() -> None:
            for block in blocks:
                if block.stream is not stream and block.stream.done < block.place:
                    self.races.append(f"{stream.name} uses memory before {block.stream.name} is done with it")
            work()

        stream.put(checked)
        for block in blocks:
            block.users.append((stream, stream.issued))

    def allocated(self, tensor: torch.Tensor) -> None:
        block = Block(self.current)
        place = tensor.untyped_storage().data_ptr()
        self.blocks[place] = block
        weakref.finalize(tensor, self.freed, place, block)

    def freed(self, place: int, block: Block) -> None:
        if self.blocks.get(place) is block:
            del self.blocks[place]
        for stream, number in block.users:
            if stream not in block.shared and stream.done < number:
                self.races.append(f"memory of {block.stream.name} is freed while {stream.name} has work with it")


class _Copies(TorchDispatchMode):
    """Puts copies that nobody waits for into the queue, and writes allocations down."""

    def __init__(self, device: LazyDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            assert args[2:] == (True,) or kwargs == {"non_blocking": True}, "a copy that the host waits for"
            same, other = self.device.alias(target), self.device.alias(source)
            self.device.queue([target, source], lambda: same.copy_(other))
            return target
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and made.numel():
            made.fill_(0xAB)
            self.device.allocated(made)
        return made
