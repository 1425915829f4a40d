"""Gather, reduce-scatter and all-reduce as direct exchanges between each pair of ranks.

gloo's own first two copy every byte several times on the way. Here each rank sends
its piece straight out of the caller's tensor to every peer, and receives
straight into the caller's tensor, or into one buffer of a pool where there is
something left to add. All of it is started by ``start``; the additions are
done in ``wait``, always in the order of the ranks' indices, so that a result
depends on nothing but the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from powertrain.errors import CommunicationError
from powertrain.kernels.sums import NARROW, combine
from powertrain.roles.communicator import Collective, Done, Handle
from powertrain_comm.algorithms import possible
from powertrain_comm.failures import explain
from powertrain_comm.operations import Group, given, taken
from powertrain_comm.pool import BufferPool

TAGS = {"all_gather": 0x7A61, "reduce_scatter": 0x7A62, "all_reduce": 0x7A63}
"""Message tags of each operation's exchanges; a user's send and receive have tag 0."""

LONG = 1 << 18
"""Bytes from which a message is sent in two parts."""

TAIL = 64
"""Bytes of the second part.

When a connection breaks amid a message, gloo tells nobody who waits for that
message: only those who wait for one that has not begun. The second part is
such a one, and it is waited for first. What is left unseen until the timeout
(or until the launcher ends the run) is a peer that dies when it has sent
everything and is still receiving: gloo never tells a sender.
"""


class Exchange:
    """Sends and receives under way, which make up one collective.

    gloo does not tell whether a message has arrived before somebody waits for
    it. So ``done`` is false until ``wait`` has returned, however early the
    messages came, and ``silent`` says so to who draws conclusions from it.

    Args:
        works: torch's handles of every send and receive; they keep the memory alive.
        collective: what they carry out.
        rank: this process's global rank, for error messages.
        finish: what is left to do once everything is here.
    """

    silent = True

    def __init__(
        self, works: Sequence[dist.Work], collective: Collective, rank: int, finish: Callable[[], None] | None
    ) -> None:
        self._works: Sequence[dist.Work] = works
        self._collective: Collective | None = collective
        self._rank = rank
        self._finish = finish
        self._error: CommunicationError | None = None

    def wait(self) -> None:
        """Return when every message has been sent and received, and the result is complete.

        Raises:
            PeerFailed: the connection to another rank broke.
            CollectiveStalled: it did not finish within the timeout.
            CommunicationError: the library failed.
        """
        collective = self._collective
        if collective is None:
            return
        if self._error is not None:
            raise self._error
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            # The works stay, and so does the memory into which other peers may still be sending.
            self._error = explain(error, collective, self._rank)
            raise self._error from error
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        self._works, self._collective = (), None

    def done(self) -> bool:
        """Return whether ``wait`` has returned; False says nothing."""
        return self._collective is None


class Pairwise:
    """Carries out collectives of one rank by direct exchanges.

    Args:
        rank: this process's global rank.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._pool = BufferPool()

    def serves(self, collective: Collective, group: Group) -> bool:
        """Return whether ``start`` carries this out, as the group's table says; all ranks of ``group`` find the same.

        Sums in 16 bits are left to gloo only where everything is: it rounds after each addition.
        """
        operation = collective.operation
        if not group.pairwise or operation not in TAGS:
            return False
        tensors = [tensor for tensor in (collective.input, collective.output) if tensor is not None]
        nbytes = max((tensor.nbytes for tensor in tensors), default=0)
        if not nbytes:
            return operation != "all_reduce"
        averages = operation == "reduce_scatter" and collective.reduction in ("sum", "mean")
        narrow = averages and any(tensor.dtype in NARROW for tensor in tensors)
        chosen = group.table.algorithm(operation, 0 if narrow else nbytes)
        return chosen == "pairwise" and possible(operation, nbytes, len(group.ranks))

    def start(self, collective: Collective, group: Group) -> Handle:
        """Start a collective for which ``serves`` is true.

        Raises:
            RuntimeError: torch refused it, or the connection is broken.
            ValueError: a tensor is missing, or its length or type does not fit the other's.
        """
        if collective.operation == "all_reduce":
            return self._reduce(collective, group, taken(collective).detach().view(-1))
        piece, whole = fit(collective, group)
        if not piece.numel():
            return Done()
        pieces = whole.split(piece.numel())
        gathers = collective.operation == "all_gather"
        return (self._gather if gathers else self._scatter)(collective, group, piece, pieces)

    def _gather(
        self, collective: Collective, group: Group, piece: torch.Tensor, pieces: Sequence[torch.Tensor]
    ) -> Handle:
        me, count = group.index, len(pieces)
        received = {peer: pieces[peer] for peer in _others(me, count)}
        works = _exchange(group, TAGS["all_gather"], received, dict.fromkeys(received, piece))
        if pieces[me].data_ptr() != piece.data_ptr():
            pieces[me].copy_(piece)  # while the messages are on their way
        return Exchange(works, collective, self._rank, None)

    def _scatter(
        self, collective: Collective, group: Group, piece: torch.Tensor, pieces: Sequence[torch.Tensor]
    ) -> Handle:
        return self._combine(collective, group, pieces[group.index], dict(enumerate(pieces)), piece)

    def _reduce(self, collective: Collective, group: Group, tensor: torch.Tensor) -> Handle:
        return self._combine(collective, group, tensor, dict.fromkeys(range(len(group.ranks)), tensor), tensor)

    def _combine(
        self,
        collective: Collective,
        group: Group,
        own: torch.Tensor,
        parts: Mapping[int, torch.Tensor],
        output: torch.Tensor,
    ) -> Handle:
        """Send each peer its one of ``parts``, and reduce ``own`` and what the peers send into ``output``."""
        me, count, pool = group.index, len(parts), self._pool
        nbytes = (count - 1) * own.numel() * own.element_size()
        buffer = pool.take(nbytes)
        rows = buffer[:nbytes].view(own.dtype).split(own.numel())
        received = dict(zip(_others(me, count), rows, strict=True))
        works = _exchange(group, TAGS[collective.operation], received, {peer: parts[peer] for peer in received})

        def finish() -> None:
            terms = [own if index == me else received[index] for index in range(count)]
            combine(output, terms, collective.reduction)
            pool.give(buffer)

        return Exchange(works, collective, self._rank, finish)

    def close(self) -> None:
        """Free what is kept for later."""
        self._pool.clear()


def fit(collective: Collective, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the piece and the whole of a gather or reduce-scatter, both flat.

    Raises:
        RuntimeError: a tensor is not contiguous.
        ValueError: a tensor is missing, or its length or type does not fit the other's.
    """
    source, target = given(collective).detach().view(-1), taken(collective).detach().view(-1)
    piece, whole = (source, target) if collective.operation == "all_gather" else (target, source)
    count = len(group.ranks)
    if whole.numel() != count * piece.numel() or whole.dtype != piece.dtype:
        raise ValueError(
            f"{collective.operation} among {count} ranks joins pieces of one length and type: "
            f"{piece.numel()} of {piece.dtype} do not fit {whole.numel()} of {whole.dtype}"
        )
    return piece, whole


def _others(me: int, count: int) -> list[int]:
    """Return the indices of the others, such that not all ranks begin with the same one."""
    return [(me + step) % count for step in range(1, count)]


def _exchange(
    group: Group, tag: int, received: dict[int, torch.Tensor], sent: dict[int, torch.Tensor]
) -> list[dist.Work]:
    """Start to receive from, and to send to, each index; receives come first, so that what is sent finds its place.

    Returns:
        Every handle, in the order in which to wait for them.
    """
    handle = group.handle
    lasts, others = [], []
    for index, tensor in received.items():
        works = [handle.recv([part], index, tag) for part in _parts(tensor)]
        lasts.append(works.pop())
        others += works
    for index, tensor in sent.items():
        others += [handle.send([part], index, tag) for part in _parts(tensor)]
    return lasts + others


def _parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the messages as which a flat tensor travels."""
    size = tensor.element_size()
    if tensor.numel() * size < LONG:
        return (tensor,)
    tail = TAIL // size
    return tensor[:-tail], tensor[-tail:]
