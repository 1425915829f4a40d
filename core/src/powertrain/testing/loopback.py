"""A world of ranks as threads of one process, connected through plain memory.

It shows what a role does with several ranks without a second process, and its
transport is the reference for communicators: the last rank to arrive at a
collective carries it out for all, in the order of their indices.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import torch

from powertrain.errors import CollectiveDiverged, CollectiveStalled, CommunicationError, PeerFailed
from powertrain.mesh import Mesh
from powertrain.roles.communicator import Collective, Communicator, Handle

T = TypeVar("T")


@attrs.define(eq=False)
class Meeting:
    """One collective of one group, until every member has come and read its end.

    Attributes:
        members: the global ranks that take part, in order of index.
        given: what each member issued.
        over: set when it is carried out or has failed.
        error: why it failed.
    """

    members: Sequence[int]
    given: dict[int, Collective] = attrs.field(factory=dict)
    over: threading.Event = attrs.field(factory=threading.Event)
    error: CommunicationError | None = None


@attrs.frozen
class LoopbackHandle:
    """A collective whose members may still be on their way."""

    meeting: Meeting
    timeout: float

    def wait(self) -> None:
        """Wait until all members have come."""
        if not self.meeting.over.wait(self.timeout):
            missing = [rank for rank in self.meeting.members if rank not in self.meeting.given]
            operation = next(iter(self.meeting.given.values())).operation
            raise CollectiveStalled(f"{operation} waits for rank {', '.join(map(str, missing))}")
        if self.meeting.error is not None:
            raise self.meeting.error

    def done(self) -> bool:
        """Return whether all members have come."""
        return self.meeting.over.is_set()


class LoopbackCommunicator(Communicator):
    """One rank's end of a loopback world."""

    def __init__(self, world: LoopbackWorld, mesh: Mesh) -> None:
        self.mesh = mesh
        self.device = torch.device("cpu")
        self._world = world
        self._counts: dict[Hashable, int] = defaultdict(int)

    def issue(self, collective: Collective) -> Handle:
        """Come to the collective; carry it out if this rank is the last."""
        members: Sequence[int] = self.mesh.peers(collective.dimension)
        kind = "group"
        if collective.operation in ("send", "receive"):
            me, other = self.rank, members[collective.peer or 0]
            members = (me, other) if collective.operation == "send" else (other, me)
            kind = "pair"
        place = (kind, collective.dimension, tuple(members))
        self._counts[place] += 1
        return self._world.come((*place, self._counts[place]), members, self.rank, collective)

    def report(self, error: BaseException) -> None:
        """Fail every collective that waits, or will wait, for this rank."""
        self._world.fail(self.rank, error)

    def describe(self) -> dict[str, str]:
        """Return the library's name."""
        return {"library": "loopback"}

    def close(self) -> None:
        """Do nothing: there is no connection."""


class LoopbackWorld:
    """``size`` ranks in one process.

    Args:
        size: the number of ranks.
        sizes: ranks along each mesh dimension; all along ``data`` when omitted.
        timeout: seconds that a rank waits for the others.

    Attributes:
        communicators: each rank's end; may also be used from one thread, by
            issuing on every rank before waiting on any.
    """

    def __init__(self, size: int, sizes: Mapping[str, int] | None = None, *, timeout: float = 20.0) -> None:
        self.communicators = [LoopbackCommunicator(self, Mesh.build(size, rank, sizes)) for rank in range(size)]
        self._timeout = timeout
        self._lock = threading.Lock()
        self._meetings: dict[Hashable, Meeting] = {}
        self._failed: PeerFailed | None = None

    def run(self, function: Callable[..., T], *args: Any) -> list[T]:
        """Run ``function(communicator, *args)`` once per rank, each in a thread; return their results.

        Args:
            function: what each rank does.
            args: passed on to every rank.

        Raises:
            Exception: what the first rank to fail raised.
        """
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def body(communicator: Communicator) -> None:
            try:
                results[communicator.rank] = function(communicator, *args)
            except BaseException as error:
                errors.append(error)
                communicator.report(error)

        threads = [threading.Thread(target=body, args=(c,), name=f"rank {c.rank}") for c in self.communicators]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[rank] for rank in range(len(threads))]

    def come(self, key: Hashable, members: Sequence[int], rank: int, collective: Collective) -> Handle:
        """Add one rank to a meeting; the last one carries it out."""
        with self._lock:
            meeting = self._meetings.setdefault(key, Meeting(members))
            meeting.given[rank] = collective
            if self._failed is not None:
                meeting.error = self._failed
                meeting.over.set()
            complete = len(meeting.given) == len(set(members))
            if complete:
                del self._meetings[key]
        if complete and meeting.error is None:
            try:
                carry_out([meeting.given[member] for member in members])
            except CommunicationError as error:
                meeting.error = error
            meeting.over.set()
        return LoopbackHandle(meeting, self._timeout)

    def fail(self, rank: int, error: BaseException) -> None:
        """End every meeting, present and future, because ``rank`` has failed."""
        with self._lock:
            if self._failed is None:
                self._failed = PeerFailed(f"rank {rank} failed", found=f"{type(error).__name__}: {error}")
            for meeting in self._meetings.values():
                meeting.error = self._failed
                meeting.over.set()


def carry_out(parts: Sequence[Collective]) -> None:
    """Carry out one collective; ``parts`` are its members' records, in order of index.

    Raises:
        CollectiveDiverged: the members do not mean the same.
    """
    first = parts[0]
    if first.operation in ("send", "receive"):
        sender, receiver = parts
        if (sender.operation, receiver.operation) != ("send", "receive"):
            raise CollectiveDiverged(f"{sender.operation} met {receiver.operation}")
        _fill(receiver, _input(sender))
        return
    _agree(parts)
    if first.operation == "barrier":
        return
    inputs = [_input(part) for part in parts]
    if first.operation == "all_reduce":
        total = _reduce(inputs, first.reduction)
        for part in parts:
            _fill(part, total)
    elif first.operation == "all_gather":
        together = torch.cat([tensor.reshape(-1) for tensor in inputs])
        for part in parts:
            _fill(part, together)
    elif first.operation == "reduce_scatter":
        pieces = _reduce([tensor.reshape(len(parts), -1) for tensor in inputs], first.reduction)
        for part, piece in zip(parts, pieces, strict=True):
            _fill(part, piece)
    elif first.operation == "broadcast":
        source = inputs[first.peer or 0].clone()
        for part in parts:
            _fill(part, source)
    else:
        _exchange(parts, inputs)


def _exchange(parts: Sequence[Collective], inputs: Sequence[torch.Tensor]) -> None:
    count = len(parts)
    cut = [
        tensor.split(list(part.input_splits)) if part.input_splits is not None else tensor.chunk(count)
        for part, tensor in zip(parts, inputs, strict=True)
    ]
    for index, part in enumerate(parts):
        pieces = [pieces[index] for pieces in cut]
        if part.output_splits is not None and [len(piece) for piece in pieces] != list(part.output_splits):
            raise CollectiveDiverged(
                "all_to_all receives other lengths than announced",
                expected=str(list(part.output_splits)),
                found=str([len(piece) for piece in pieces]),
            )
        _fill(part, torch.cat(pieces))


def _agree(parts: Sequence[Collective]) -> None:
    def meaning(part: Collective) -> tuple[object, ...]:
        shape = None if part.input is None or part.operation == "all_to_all" else tuple(part.input.shape)
        dtype = None if part.input is None else part.input.dtype
        return part.operation, part.reduction, part.peer, shape, dtype

    for index, part in enumerate(parts):
        if meaning(part) != meaning(parts[0]):
            raise CollectiveDiverged(
                "ranks issued different collectives",
                where=f"index {index} along {part.dimension!r}",
                expected=str(meaning(parts[0])),
                found=str(meaning(part)),
            )


def _reduce(tensors: Sequence[torch.Tensor], reduction: str) -> torch.Tensor:
    stacked = torch.stack(list(tensors))
    if reduction == "max":
        return stacked.amax(0)
    if reduction == "min":
        return stacked.amin(0)
    total = stacked.sum(0, dtype=stacked.dtype)
    return total / len(tensors) if reduction == "mean" else total


def _input(part: Collective) -> torch.Tensor:
    if part.input is None:
        raise CollectiveDiverged(f"{part.operation} was issued without an input")
    return part.input.detach()


def _fill(part: Collective, value: torch.Tensor) -> None:
    if part.output is None or part.output.numel() != value.numel() or part.output.dtype != value.dtype:
        found = "no output" if part.output is None else f"{tuple(part.output.shape)} of {part.output.dtype}"
        raise CollectiveDiverged(
            f"{part.operation} cannot put its result into the output",
            expected=f"{value.numel()} elements of {value.dtype}",
            found=found,
        )
    part.output.detach().copy_(value.view_as(part.output))
