"""The communicator role: what connects the ranks.

Every operation becomes one ``Collective`` record that is handed to ``issue``.
A transport implements ``issue`` once for all operations, and a wrapper
(watchdog, tracing, compression) overrides it to see or change every one.
Operations are asynchronous without exception: each returns a ``Handle``, and
its tensors must be left alone until ``wait`` returns.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import attrs
import torch

from powertrain.mesh import WORLD, Mesh

Operation = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "receive", "barrier"
]
Reduction = Literal["sum", "mean", "max", "min"]


@attrs.define(kw_only=True, slots=True)
class Collective:
    """One operation among the ranks along one dimension.

    Attributes:
        operation: which one.
        dimension: the mesh dimension, ``"world"``, or a name that ``Communicator.split`` returned.
        input: what this rank gives (None for receive and barrier).
        output: what this rank gets; the same tensor as ``input`` where it works in place.
        reduction: how values combine.
        peer: the other side's (or the source's) index along ``dimension``.
        input_splits: elements along dimension 0 for each peer (all_to_all; None: equal).
        output_splits: elements along dimension 0 from each peer.
        label: what it is for, for people: a parameter's or bucket's name.
        lossy: how many elements may arrive approximately, as gradients may: the first ones of an all_reduce's
            tensor, or of each index's piece of a reduce_scatter's. Only a wrapper that compresses looks at it.
    """

    operation: Operation
    dimension: str
    input: torch.Tensor | None = None
    output: torch.Tensor | None = None
    reduction: Reduction = attrs.field(default="sum", validator=attrs.validators.in_(get_args(Reduction)))
    peer: int | None = None
    input_splits: tuple[int, ...] | None = None
    output_splits: tuple[int, ...] | None = None
    label: str = ""
    lossy: int = 0


@attrs.frozen(kw_only=True)
class Traffic:
    """What one rank sent along one dimension by one operation.

    Bytes are those that this rank must send to others by the operation's best algorithm, whatever the
    library does: of n ranks, (n - 1) x its input for all_gather, (n - 1) / n x its input for reduce_scatter,
    2 (n - 1) / n x the tensor for all_reduce, its input less its own piece for all_to_all, the tensor for
    send and at the source of a broadcast, and nothing for the rest.

    Attributes:
        operation: which one.
        dimension: along which dimension.
        data: what for: the label, up to a name or a number.
        calls: how often.
        bytes: sent to other ranks, in all.
        seconds: that they took, from start to end; 0 where nobody measured.
        exposed: of these, what somebody waited for.
    """

    operation: Operation
    dimension: str
    data: str = ""
    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0
    exposed: float = 0.0


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Return when the result may be read and the inputs reused.

        Raises:
            CommunicationError: it failed, stalled, or a peer is gone.
        """

    def done(self) -> bool:
        """Return whether ``wait`` would return at once; False, until then, where only ``wait`` can find out."""


class Done:
    """The handle of something that needed no waiting."""

    def wait(self) -> None:
        """Return at once."""

    def done(self) -> bool:
        """Return True."""
        return True


class Handles:
    """Several handles as one."""

    def __init__(self, parts: Iterable[Handle]) -> None:
        self.parts = list(parts)

    @property
    def silent(self) -> bool:
        """Whether ``done`` stays false, although all is over, until somebody waits."""
        return any(getattr(part, "silent", False) for part in self.parts)

    def wait(self) -> None:
        """Wait for every part."""
        for part in self.parts:
            part.wait()

    def done(self) -> bool:
        """Return whether every part is done."""
        return all(part.done() for part in self.parts)


class Communicator(ABC):
    """The ranks of a mesh, connected.

    All ranks along a dimension must issue the same collectives in the same
    order. Tensors are contiguous and on ``device``.

    Attributes:
        mesh: the ranks' arrangement.
        device: where the tensors live.
    """

    mesh: Mesh
    device: torch.device

    # --- what a transport implements -------------------------------------------

    @abstractmethod
    def issue(self, collective: Collective) -> Handle:
        """Start one collective."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group; called once, on every rank, after the last collective."""

    def issue_together(self, collectives: Sequence[Collective]) -> Handle:
        """Start several collectives that may share one launch; they wait as one."""
        return Handles([self.issue(collective) for collective in collectives])

    def split(self, dimension: str, size: int) -> tuple[str, str]:
        """Cut ``dimension`` into groups of ``size`` neighbouring ranks, and return the names of what comes of it.

        ``split("data", 4)`` returns ``("data.within4", "data.across4")``, which may stand wherever a dimension
        may. Along the first lie the ranks of one group, along the second those at the same place of every
        group. All ranks of the world call it, in the same order, before the names are used; once more with
        the same arguments changes nothing.

        Args:
            dimension: what to cut: a mesh dimension, ``"world"``, or a name that ``split`` returned.
            size: ranks in a group; 1 and the whole dimension are allowed.

        Raises:
            ShardingError: the groups do not come out even.
            CommunicationError: the groups could not be connected.
        """
        return self.mesh.split(dimension, size)

    def empty(self, numel: int, dtype: torch.dtype, dimension: str = "data") -> torch.Tensor:
        """Return a flat, uninitialized buffer that collectives along ``dimension`` reach cheaply.

        Memory that peers can read in place where the transport has such a
        thing, ordinary memory elsewhere.
        """
        return torch.empty(numel, dtype=dtype, device=self.device)

    def report(self, error: BaseException) -> None:
        """Tell the other ranks, as far as possible, that this one has failed with ``error``."""

    def traffic(self) -> list[Traffic]:
        """Return what this rank has sent so far; empty where nobody counts."""
        return []

    def state(self) -> dict[str, torch.Tensor]:
        """Return what this rank must keep to go on as if nothing had happened (errors of compression), by name."""
        return {}

    def wants(self, name: str) -> bool:
        """Return whether ``load_state`` has a use for the entry ``name`` of an earlier run's state.

        All of it, if a class has a ``load_state`` of its own and does not say better.
        """
        return type(self).load_state is not Communicator.load_state

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from ``state``; of another number of ranks it is the mean of theirs. What is unknown is let go."""

    def describe(self) -> dict[str, str]:
        """Return facts for people: library, version, interfaces."""
        return {}

    # --- what callers use --------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process's global rank."""
        return self.mesh.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.mesh.world_size

    def size(self, dimension: str) -> int:
        """Return how many ranks lie along ``dimension``."""
        return self.mesh.size(dimension)

    def index(self, dimension: str) -> int:
        """Return this rank's coordinate along ``dimension``."""
        return self.mesh.index(dimension)

    def all_reduce(
        self,
        tensor: torch.Tensor,
        dimension: str = "data",
        *,
        reduction: Reduction = "sum",
        label: str = "",
        lossy: int = 0,
    ) -> Handle:
        """Replace ``tensor`` on every rank by the reduction over all ranks; the first ``lossy`` elements, about."""
        return self.issue(
            Collective(
                operation="all_reduce",
                dimension=dimension,
                input=tensor,
                output=tensor,
                reduction=reduction,
                label=label,
                lossy=lossy,
            )
        )

    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, dimension: str = "data", *, label: str = ""
    ) -> Handle:
        """Fill ``output`` (size x numel) with the ranks' ``input`` (numel), in order of index.

        ``input`` may be this index's own piece of ``output``: then nothing is copied here.
        """
        return self.issue(
            Collective(operation="all_gather", dimension=dimension, input=input, output=output, label=label)
        )

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        dimension: str = "data",
        *,
        reduction: Reduction = "sum",
        label: str = "",
        lossy: int = 0,
    ) -> Handle:
        """Fill ``output`` (numel) with this index's piece of the reduced ``input`` (size x numel).

        ``output`` may be this index's own piece of ``input``; the rest of ``input`` stays as it is. Of every piece
        the first ``lossy`` elements may come out about right.
        """
        return self.issue(
            Collective(
                operation="reduce_scatter",
                dimension=dimension,
                input=input,
                output=output,
                reduction=reduction,
                label=label,
                lossy=lossy,
            )
        )

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        dimension: str = "data",
        *,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        label: str = "",
    ) -> Handle:
        """Send piece i of ``input`` to index i, and fill ``output`` with the pieces received, in order."""
        return self.issue(
            Collective(
                operation="all_to_all",
                dimension=dimension,
                input=input,
                output=output,
                input_splits=None if input_splits is None else tuple(input_splits),
                output_splits=None if output_splits is None else tuple(output_splits),
                label=label,
            )
        )

    def broadcast(self, tensor: torch.Tensor, source: int, dimension: str = "data", *, label: str = "") -> Handle:
        """Copy ``tensor`` of index ``source`` into every rank's ``tensor``."""
        return self.issue(
            Collective(
                operation="broadcast", dimension=dimension, input=tensor, output=tensor, peer=source, label=label
            )
        )

    def send(self, tensor: torch.Tensor, destination: int, dimension: str, *, label: str = "") -> Handle:
        """Send ``tensor`` to index ``destination``, which must ``receive`` it."""
        return self.issue(
            Collective(operation="send", dimension=dimension, input=tensor, peer=destination, label=label)
        )

    def receive(self, tensor: torch.Tensor, source: int, dimension: str, *, label: str = "") -> Handle:
        """Fill ``tensor`` with what index ``source`` sends."""
        return self.issue(Collective(operation="receive", dimension=dimension, output=tensor, peer=source, label=label))

    def barrier(self, dimension: str = WORLD, *, label: str = "") -> Handle:
        """Wait, in ``wait``, until every rank along ``dimension`` has come here."""
        return self.issue(Collective(operation="barrier", dimension=dimension, label=label))

    def gather_json(self, value: Any, dimension: str = WORLD, *, label: str = "") -> list[Any]:
        """Return every rank's ``value``, in order of index; values are JSON, never pickles."""
        count = self.size(dimension)
        if count == 1:
            return [json.loads(json.dumps(value))]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.empty(count, dtype=torch.int64, device=self.device)
        mine = torch.tensor([data.numel()], dtype=torch.int64, device=self.device)
        self.all_gather(lengths, mine, dimension, label=label).wait()
        longest = int(lengths.max())
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        everything = torch.empty(count * longest, dtype=torch.uint8, device=self.device)
        self.all_gather(everything, padded, dimension, label=label).wait()
        rows = everything.cpu().view(count, longest)
        return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths.tolist(), strict=True)]


class WrappedCommunicator(Communicator):
    """Base of wrappers: passes everything on to ``inner``."""

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner
        self.mesh = inner.mesh
        self.device = inner.device

    def issue(self, collective: Collective) -> Handle:
        """Start one collective on the wrapped communicator."""
        return self.inner.issue(collective)

    def issue_together(self, collectives: Sequence[Collective]) -> Handle:
        """Start several collectives on the wrapped communicator."""
        return self.inner.issue_together(collectives)

    def split(self, dimension: str, size: int) -> tuple[str, str]:
        """Cut a dimension of the wrapped communicator."""
        return self.inner.split(dimension, size)

    def empty(self, numel: int, dtype: torch.dtype, dimension: str = "data") -> torch.Tensor:
        """Return the wrapped communicator's buffer."""
        return self.inner.empty(numel, dtype, dimension)

    def report(self, error: BaseException) -> None:
        """Report through the wrapped communicator."""
        self.inner.report(error)

    def traffic(self) -> list[Traffic]:
        """Return what the wrapped communicator counted."""
        return self.inner.traffic()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the wrapped communicator's state."""
        return self.inner.state()

    def wants(self, name: str) -> bool:
        """Return what the wrapped communicator wants, or all, as ``Communicator`` does."""
        return type(self).load_state is not WrappedCommunicator.load_state or self.inner.wants(name)

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Let the wrapped communicator continue."""
        self.inner.load_state(state)

    def describe(self) -> dict[str, str]:
        """Return the wrapped communicator's facts."""
        return self.inner.describe()

    def close(self) -> None:
        """Close the wrapped communicator."""
        self.inner.close()


class SingleProcess(Communicator):
    """The communicator of a world of one: every collective is a copy at most."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.mesh = mesh
        self.device = device

    def issue(self, collective: Collective) -> Handle:
        """Copy the input to the output where they differ."""
        if collective.operation in ("send", "receive"):
            raise ValueError("a world of one has nobody to send to")
        source, target = collective.input, collective.output
        if source is not None and target is not None and source is not target:
            target.copy_(source.view_as(target))
        return Done()

    def close(self) -> None:
        """Do nothing."""
