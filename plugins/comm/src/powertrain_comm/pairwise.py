"""Gather and reduce-scatter as direct exchanges between each pair of ranks.

gloo's own two copy every byte several times on the way. Here each rank sends
its piece straight out of the caller's tensor to every peer, and receives
straight into the caller's tensor, or into one buffer of a pool where there is
something left to add. All of it is started by ``start``; the additions are
done in ``wait``, always in the order of the ranks' indices, so that a result
depends on nothing but the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from powertrain.errors import CommunicationError
from powertrain.kernels.sums import combine
from powertrain.roles.communicator import Collective, Done, Handle
from powertrain_comm.failures import explain
from powertrain_comm.operations import Group, given, taken
from powertrain_comm.pool import BufferPool

TAGS = {"all_gather": 0x7A61, "reduce_scatter": 0x7A62}
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
        """Return whether ``start`` can carry this out; all ranks of ``group`` find the same."""
        return group.pairwise and collective.operation in TAGS

    def start(self, collective: Collective, group: Group) -> Handle:
        """Start a collective for which ``serves`` is true.

        Raises:
            RuntimeError: torch refused it, or the connection is broken.
            ValueError: a tensor is missing, or its length or type does not fit the other's.
        """
        gathers = collective.operation == "all_gather"
        source, target = given(collective).detach().view(-1), taken(collective).detach().view(-1)
        piece, whole = (source, target) if gathers else (target, source)
        count = len(group.ranks)
        if whole.numel() != count * piece.numel() or whole.dtype != piece.dtype:
            raise ValueError(
                f"{collective.operation} among {count} ranks joins pieces of one length and type: "
                f"{piece.numel()} of {piece.dtype} do not fit {whole.numel()} of {whole.dtype}"
            )
        if not piece.numel():
            return Done()
        pieces = whole.split(piece.numel())
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
        me, count, pool = group.index, len(pieces), self._pool
        nbytes = (count - 1) * piece.numel() * piece.element_size()
        buffer = pool.take(nbytes)
        rows = buffer[:nbytes].view(piece.dtype).split(piece.numel())
        received = dict(zip(_others(me, count), rows, strict=True))
        works = _exchange(group, TAGS["reduce_scatter"], received, {peer: pieces[peer] for peer in received})

        def finish() -> None:
            terms = [pieces[me] if index == me else received[index] for index in range(count)]
            combine(piece, terms, collective.reduction)
            pool.give(buffer)

        return Exchange(works, collective, self._rank, finish)

    def close(self) -> None:
        """Free what is kept for later."""
        self._pool.clear()


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
