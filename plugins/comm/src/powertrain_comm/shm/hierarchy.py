"""Collectives of ranks on several hosts: within each host through shared memory, between hosts over the network.

What crosses the network is a host's share of the bytes once, not once for each
of its ranks: an all_reduce is a reduce_scatter within the host, an all_reduce
of each rank's piece with the ranks at the same place of the other hosts, and an
all_gather within the host.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator

import torch

from powertrain.mesh import Mesh
from powertrain.roles.communicator import Collective, Communicator, Handle
from powertrain_comm.operations import given, taken

LEAST = 1 << 16
"""Bytes below which a collective is one message over the network: three hops would take longer."""

Steps = Iterator[Handle]


def neighbours(mesh: Mesh, dimension: str, hosts: tuple[int, ...]) -> int:
    """Return how many ranks of a group along ``dimension`` each host has, in a row; 0 where that is not even.

    Args:
        mesh: the ranks' arrangement.
        dimension: along which.
        hosts: of every global rank, the number of its host.
    """
    found = set()
    for ranks in mesh.groups(dimension):
        runs = [1]
        for before, rank in itertools.pairwise(ranks):
            if hosts[before] == hosts[rank]:
                runs[-1] += 1
            else:
                runs.append(1)
        if len(runs) != len({hosts[rank] for rank in ranks}):
            return 0  # a host comes twice
        found |= set(runs)
    return found.pop() if len(found) == 1 else 0


def spans(mesh: Mesh, dimension: str, hosts: tuple[int, ...]) -> bool:
    """Return whether any group along ``dimension`` has ranks of several hosts; all ranks find the same."""
    return any(len({hosts[rank] for rank in ranks}) > 1 for ranks in mesh.groups(dimension))


class ChainHandle:
    """Several collectives that follow one another.

    Args:
        steps: starts each, and goes on when it is over.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._over = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Carry out all steps; what fails is raised by ``wait``."""
        try:
            for handle in self._steps:
                handle.wait()
        except BaseException as error:
            self._error = error
        self._over.set()

    def wait(self) -> None:
        """Return when the last step is over.

        Raises:
            CommunicationError: a step failed.
        """
        self._over.wait()
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Return whether ``wait`` would return at once."""
        return self._over.is_set()


class Hierarchy:
    """The collectives along one dimension whose ranks are on several hosts.

    A thread of its own carries them out, in the order in which they were issued, so that they get on while
    Python computes.

    Args:
        local: starts a collective among this host's ranks of the dimension, in lanes of its own.
        network: connects the hosts, by groups that nothing else uses.
        across: the name of the dimension that joins ranks at the same place of each host.
        size: ranks of one host.
        index: this rank's place along the dimension.
        name: of the dimension.
    """

    def __init__(
        self,
        local: Callable[[Collective], Handle],
        network: Communicator,
        across: str,
        size: int,
        index: int,
        name: str,
    ) -> None:
        self._local = local
        self._network = network
        self._across = across
        self._size = size
        self._index = index
        self._name = name
        self._queue: queue.SimpleQueue[ChainHandle | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def serves(self, collective: Collective) -> bool:
        """Return whether ``issue`` carries this out; all ranks find the same."""
        tensor = collective.output
        if tensor is None or collective.operation not in ("all_reduce", "reduce_scatter", "all_gather"):
            return False
        return tensor.nbytes >= LEAST

    def issue(self, collective: Collective) -> Handle:
        """Start one collective."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True, name=f"powertrain {self._name}")
            self._thread.start()
        if collective.operation != "all_reduce":
            refuse_uneven(collective, self._network.size(collective.dimension))
        steps = {"all_reduce": self._all_reduce, "reduce_scatter": self._reduce_scatter, "all_gather": self._all_gather}
        handle = ChainHandle(steps[collective.operation](collective))
        self._queue.put(handle)
        return handle

    def close(self) -> None:
        """End the thread, once what was issued is over."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        while (handle := self._queue.get()) is not None:
            handle.run()

    @property
    def _place(self) -> int:
        """This rank's place among those of its host."""
        return self._index % self._size

    def _within(self, c: Collective, operation: str, output: torch.Tensor, input: torch.Tensor) -> Handle:
        part = Collective(
            operation=operation,  # type: ignore[arg-type]
            dimension=c.dimension,
            input=input,
            output=output,
            reduction=c.reduction,
            label=c.label,
        )
        return self._local(part)

    def _all_reduce(self, c: Collective) -> Steps:
        flat = taken(c).view(-1)
        piece = flat.numel() // self._size
        even, rest = flat[: piece * self._size], flat[piece * self._size :]
        mine = even[piece * self._place : piece * (self._place + 1)]
        yield self._within(c, "reduce_scatter", mine, even)
        yield self._network.all_reduce(mine, self._across, reduction=c.reduction, label=c.label)
        yield self._within(c, "all_gather", even, mine)
        if rest.numel():
            yield self._network.all_reduce(rest, c.dimension, reduction=c.reduction, label=c.label)

    def _reduce_scatter(self, c: Collective) -> Steps:
        output, whole = taken(c).view(-1), given(c).view(-1)
        hosts = whole.numel() // output.numel() // self._size
        # A host's ranks are neighbours: of what goes to each host, this rank reduces the piece for its own place.
        pieces = torch.empty(hosts, output.numel(), dtype=output.dtype, device=output.device)
        for piece, part in zip(pieces, whole.view(hosts, -1), strict=True):
            yield self._within(c, "reduce_scatter", piece, part)
        yield self._network.reduce_scatter(output, pieces.view(-1), self._across, reduction=c.reduction, label=c.label)

    def _all_gather(self, c: Collective) -> Steps:
        output, piece = taken(c).view(-1), given(c).view(-1)
        hosts = output.numel() // piece.numel() // self._size
        pieces = torch.empty(hosts, piece.numel(), dtype=piece.dtype, device=piece.device)
        yield self._network.all_gather(pieces.view(-1), piece, self._across, label=c.label)
        for part, whole in zip(pieces, output.view(hosts, -1), strict=True):
            yield self._within(c, "all_gather", whole, part)


def refuse_uneven(c: Collective, count: int) -> None:
    """Refuse tensors whose lengths do not fit.

    Raises:
        ValueError: the whole is not ``count`` pieces.
    """
    piece, whole = (given(c), taken(c)) if c.operation == "all_gather" else (taken(c), given(c))
    if whole.numel() != count * piece.numel():
        raise ValueError(
            f"{c.operation} among {count} ranks joins pieces of one length: {piece.numel()} elements do not fit "
            f"{whole.numel()}"
        )
