"""The communicator that goes through shared memory wherever its ranks are on one host."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from powertrain.errors import CollectiveDiverged, CollectiveStalled, CommunicationError, PeerFailed
from powertrain.mesh import DIMENSIONS, WORLD
from powertrain.roles.communicator import Collective, Communicator, Handle, Handles, WrappedCommunicator
from powertrain_comm.operations import given, taken
from powertrain_comm.shm.hierarchy import Hierarchy, neighbours
from powertrain_comm.shm.peers import DIMENSIONS as LANES
from powertrain_comm.shm.peers import Host

OPERATIONS = {"all_reduce": 0, "all_gather": 1, "reduce_scatter": 2, "all_to_all": 3, "broadcast": 4, "barrier": 5}
REDUCTIONS = {"sum": 0, "mean": 1, "max": 2, "min": 3}
FORMATS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int32: 6,
    torch.int64: 7,
}
"""Types that C++ adds; ``powertrain/formats.h`` has the same numbers."""

REDUCES = ("all_reduce", "reduce_scatter")
SLICE = 1.0
"""Seconds after which a rank that waits looks whether it was interrupted."""
UNDER_WAY, DONE, PEER_GONE, DIVERGED = range(4)


class SharedHandle:
    """A collective under way in shared memory.

    Args:
        engine: carries it out.
        inner: its C++ side.
        collective: what it is; its tensors stay as long as this handle.
        rank: this process's global rank.
        ranks: the global ranks of this host, by place.
        timeout: seconds that it may take.
    """

    __slots__ = ("_collective", "_deadline", "_engine", "_inner", "_rank", "_ranks")

    def __init__(
        self, engine: Any, inner: Any, collective: Collective, rank: int, ranks: tuple[int, ...], timeout: float
    ) -> None:
        self._engine = engine
        self._inner = inner
        self._collective = collective
        self._rank = rank
        self._ranks = ranks
        self._deadline = time.monotonic() + timeout

    def wait(self) -> None:
        """Return when the result may be read and the inputs reused.

        Raises:
            PeerFailed: a rank of this host has ended, or has left.
            CollectiveDiverged: the ranks issued different collectives.
            CollectiveStalled: it did not finish within the timeout.
            CommunicationError: shared memory is used up.
        """
        if self._inner.status == DONE:
            return
        while not self._engine.wait(self._inner, min(SLICE, max(0.0, self._deadline - time.monotonic()))):
            if time.monotonic() >= self._deadline:
                raise CollectiveStalled(f"{self._what()} did not finish in time", where=self._where())
        if self._inner.status != DONE:
            raise self._error()

    def done(self) -> bool:
        """Return whether ``wait`` would return at once."""
        return bool(self._inner.status != UNDER_WAY)

    def elapsed(self) -> float:
        """Return the seconds from the start to the end, which may be long before ``wait``; it must be over."""
        return float(self._inner.seconds)

    def _what(self) -> str:
        collective = self._collective
        return collective.operation + (f" of {collective.label!r}" if collective.label else "")

    def _where(self) -> str:
        return f"rank {self._rank}, along {self._collective.dimension!r}"

    def _error(self) -> CommunicationError:
        status, message = self._inner.status, self._inner.message
        culprit = f"rank {self._ranks[self._inner.culprit]}" if self._inner.culprit >= 0 else "a rank"
        if status == PEER_GONE:
            return PeerFailed(f"{self._what()} lost {culprit}", where=self._where(), found=message)
        if status == DIVERGED:
            theirs, _, ours = message.partition("|")
            return CollectiveDiverged(
                f"{culprit} issued another collective than {self._what()}",
                where=self._where(),
                expected=_named(ours) if ours else f"{self._collective.operation} of pieces that fit on every rank",
                found=_named(theirs) if ours else message,
            )
        return CommunicationError(f"{self._what()} failed", where=self._where(), found=f"{culprit}: {message}")


class SharedMemoryCommunicator(WrappedCommunicator):
    """Ranks of one host through shared memory, everything else through another communicator.

    Args:
        inner: connects all ranks.
        host: the ranks of this host.
        timeout: seconds that a collective may take.
        network: connects the hosts for collectives of ranks on several of them, by groups that nothing else uses;
            None where there is one host.
    """

    def __init__(self, inner: Communicator, host: Host, timeout: float, network: Communicator | None = None) -> None:
        super().__init__(inner)
        self._host = host
        self._timeout = timeout
        self._numbers: dict[str, int] = {}
        self._places: dict[str, list[int] | None] = {}
        self._network = network
        self._spread: dict[str, Hierarchy] = {}
        self._under_way: deque[SharedHandle] = deque()
        self._lock = threading.Lock()  # a hierarchy issues from a thread of its own
        for dimension in (WORLD, *DIMENSIONS):
            self._number(dimension)

    def _number(self, dimension: str) -> None:
        """Give a dimension its lanes, the same on all ranks, and find out whether its ranks are here."""
        if dimension in self._numbers:
            return
        number = self._numbers[dimension] = len(self._numbers)
        ranks = self.mesh.peers(dimension)
        here = [rank for rank in ranks if rank in self._host.ranks]
        self._places[dimension] = None
        if len(ranks) == 1 or number >= LANES:
            return
        if len(here) == len(ranks):
            self._places[dimension] = self._places_of(here)
        elif self._network is not None and (size := neighbours(self.mesh, dimension, self._host.hosts)) > 1:
            _, across = self._network.split(dimension, size)
            self._spread[dimension] = Hierarchy(
                lambda part: self._start(part, number, self._places_of(here), here.index(self.rank)),
                self._network, across, size, self.mesh.index(dimension), dimension,
            )  # fmt: skip

    def _places_of(self, ranks: Sequence[int]) -> list[int]:
        return [self._host.ranks.index(rank) for rank in ranks]

    def split(self, dimension: str, size: int) -> tuple[str, str]:
        """Cut a dimension; the halves get lanes of their own."""
        names = self.inner.split(dimension, size)
        if self._network is not None:
            self._network.split(dimension, size)
        for name in names:
            self._number(name)
        return names

    def empty(self, numel: int, dtype: torch.dtype, dimension: str = "data") -> torch.Tensor:
        """Return memory that the ranks of this host can read in place; ordinary memory where it is used up."""
        reached = self._places.get(dimension) is not None or dimension in self._spread
        if reached and numel and self.device.type == "cpu":
            block = self._host.heap.allocate(numel * dtype.itemsize)
            if block is not None:
                return torch.frombuffer(block, dtype=dtype, count=numel)
        return self.inner.empty(numel, dtype, dimension)

    def issue(self, collective: Collective) -> Handle:
        """Start one collective.

        Raises:
            CommunicationError: it could not be started.
            ValueError: a tensor is missing or not contiguous, or lengths and types do not fit.
        """
        dimension = collective.dimension
        if not _serves(collective):
            return self.inner.issue(collective)
        if (places := self._places.get(dimension)) is not None:
            return self._start(collective, self._numbers[dimension], places, self.mesh.index(dimension))
        if (hierarchy := self._spread.get(dimension)) is not None and hierarchy.serves(collective):
            return hierarchy.issue(collective)
        return self.inner.issue(collective)

    def issue_together(self, collectives: Sequence[Collective]) -> Handle:
        """Start several collectives, each where it belongs; they wait as one."""
        return Handles([self.issue(collective) for collective in collectives])

    def _start(self, collective: Collective, number: int, places: list[int], me: int) -> Handle:
        """Start one collective among ranks of this host, of which this is the one at ``me``."""
        host = self._host
        arguments = self._arguments(collective, number, places, me)
        with self._lock:
            while self._under_way and self._under_way[0].done():
                self._under_way.popleft()
            inner = host.engine.issue(*arguments)
            handle = SharedHandle(host.engine, inner, collective, self.rank, host.ranks, self._timeout)
            self._under_way.append(handle)  # tensors must stay, even if nobody waits
        return handle

    def _arguments(self, collective: Collective, number: int, places: list[int], me: int) -> tuple[Any, ...]:
        """Return what C++ wants to know of a collective."""
        operation, count = collective.operation, len(places)
        if operation in ("send", "receive"):
            other = collective.peer
            if other is None or not 0 <= other < count or other == me:
                raise ValueError(f"index {other} is not among the others of the {count} ranks along the dimension")
            sends = operation == "send"
            pair = (me, other) if sends else (other, me)
            tensor = _whole(operation, given(collective) if sends else taken(collective))
            ranks = [places[pair[0]], places[pair[1]]]
            lane = self._host.lane(number, *ranks)
            address = tensor.data_ptr()
            where = (address, 0) if sends else (0, address)
            return lane, ranks, 0 if sends else 1, OPERATIONS["broadcast"], 5, 0, 0, tensor.nbytes, *where, [], []
        lane = self._host.lane(number)
        head = (lane, places, me, OPERATIONS[operation])
        if operation == "barrier":
            return *head, 5, 0, 0, 0, 0, 0, [], []
        source, target = _whole(operation, given(collective)), _whole(operation, taken(collective))
        if source.dtype != target.dtype:
            raise ValueError(f"{operation} gives {source.dtype} and takes {target.dtype}: they must be of one type")
        if operation in REDUCES:
            shape = FORMATS[target.dtype], REDUCTIONS[collective.reduction]
            _fits(operation, source.numel(), target.numel() * (count if operation == "reduce_scatter" else 1))
            return *head, *shape, 0, target.numel(), source.data_ptr(), target.data_ptr(), [], []
        # What is only moved travels as bytes, whatever its type.
        size = source.element_size()
        addresses = source.data_ptr(), target.data_ptr()
        if operation == "broadcast":
            if collective.peer is None or not 0 <= collective.peer < count:
                raise ValueError(f"index {collective.peer} is not among the {count} ranks along the dimension")
            return *head, 5, 0, collective.peer, target.nbytes, *addresses, [], []
        if operation == "all_gather":
            _fits(operation, source.numel() * count, target.numel())
            return *head, 5, 0, 0, source.nbytes, *addresses, [], []
        starts = _starts(collective.input_splits, source, count, size)
        takes = _starts(collective.output_splits, target, count, size)
        return *head, 5, 0, 0, source.nbytes, *addresses, starts, takes

    def describe(self) -> dict[str, str]:
        """Return that memory is shared among which ranks, and the inner communicator's facts."""
        ranks = self._host.ranks
        return {
            **self.inner.describe(),
            "shared memory": f"ranks {', '.join(map(str, ranks))} on this host",
        }

    def close(self) -> None:
        """Leave the host's ranks, then close the inner communicator."""
        for hierarchy in self._spread.values():
            hierarchy.close()
        self._host.engine.close()
        self._under_way.clear()
        if self._network is not None:
            self._network.close()
        self.inner.close()


def _serves(collective: Collective) -> bool:
    """Return whether shared memory can carry this out; every rank finds the same."""
    tensor = collective.output if collective.output is not None else collective.input
    if tensor is None:
        return collective.operation == "barrier"
    if tensor.device.type != "cpu":
        return False
    if collective.operation in REDUCES:
        return tensor.dtype in FORMATS and (collective.reduction != "mean" or tensor.is_floating_point())
    return True


def _named(numbers: str) -> str:
    """Return what C++ tells of a collective (operation, type, reduction, source, elements) in words."""
    operation, kind, how, source, numel = map(int, numbers.split())
    name = next(name for name, number in OPERATIONS.items() if number == operation)
    if name == "barrier":
        return name
    if name not in REDUCES:
        return f"{name} of {numel} bytes" + (f" from index {source}" if name == "broadcast" else "")
    dtype = next(dtype for dtype, number in FORMATS.items() if number == kind)
    reduction = next(reduction for reduction, number in REDUCTIONS.items() if number == how)
    return f"{name} ({reduction}) of {numel} elements of {dtype}"


def _whole(operation: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{operation} takes contiguous tensors, not {tuple(tensor.shape)} with strides {tensor.stride()}: "
            "call .contiguous() first, and copy the result back"
        )
    return tensor


def _fits(operation: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{operation} joins pieces of one length: {found} elements do not fit {expected}")


def _starts(splits: tuple[int, ...] | None, tensor: torch.Tensor, count: int, size: int) -> list[int]:
    """Return where each rank's piece begins, in bytes, and where the last one ends."""
    rows = len(tensor)
    if splits is None:
        if rows % count:
            raise ValueError(f"{rows} rows do not split evenly among {count} ranks")
        splits = (rows // count,) * count
    if len(splits) != count or sum(splits) != rows:
        raise ValueError(f"splits {splits} are not those of {rows} rows among {count} ranks")
    row = tensor.numel() // rows * size if rows else 0
    result = [0]
    for split in splits:
        result.append(result[-1] + split * row)
    return result
