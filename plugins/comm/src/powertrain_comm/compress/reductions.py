"""Reductions whose elements travel as bytes: what was sent is summed up in fp32 at the rank that owns the piece.

A reduce-scatter is one hop, an all-to-all of encoded pieces. An all-reduce has
a second: each rank encodes its piece of the mean, and all gather the bytes, so
that all ranks decode the same ("1-bit Adam", arXiv 2102.02888, figure 3). A
ring would compress a sum once a rank; here each element is compressed once a hop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from powertrain.roles.communicator import Collective, Handle
from powertrain_comm.compress.feedback import WHOLE, WHOLES

if TYPE_CHECKING:
    from powertrain_comm.compress.communicator import CompressedCommunicator


class Scattered:
    """A reduce-scatter under way.

    Args:
        owner: sends, and remembers what was rounded away.
        collective: what was asked for; all of each piece is lossy.
        name: under which errors are remembered; by default that of pieces for so many ranks.
    """

    def __init__(self, owner: CompressedCommunicator, collective: Collective, name: str = "") -> None:
        assert collective.input is not None and collective.output is not None
        self._output = collective.output
        self._codec, self._ranks = owner.codec, owner.size(collective.dimension)
        self._divisor = self._ranks if collective.reduction == "mean" else 1
        name = name or f"sent/{self._ranks}/{collective.dimension}/{collective.label}"
        pieces = collective.input.view(self._ranks, -1)
        self._numel = pieces.shape[1]
        padded = _padded(pieces, self._codec.block)
        # Kept until all of it has been sent.
        self._leaving: torch.Tensor | None = owner.feedback.encode(name, padded, self._codec)
        self._arriving = torch.empty_like(self._leaving)
        label = f"{collective.label}, compressed"
        self._handle = owner.inner.all_to_all(
            self._arriving.view(-1), self._leaving.view(-1), collective.dimension, label=label
        )
        self._padded = padded.shape[1]

    @torch.no_grad()
    def wait(self) -> None:
        """Return when the piece is in ``output``."""
        if self._leaving is None:
            return
        self._output.view(-1).copy_(self.reduced()[: self._numel])
        self._leaving = None

    def reduced(self) -> torch.Tensor:
        """Wait for the bytes; return the reduced piece in fp32, padding included."""
        self._handle.wait()
        rows = torch.empty(self._ranks, self._padded, device=self._output.device)
        self._codec.decode(self._arriving, rows)
        total = rows[0]
        for row in rows[1:]:  # in the order of the ranks
            total.add_(row)
        return total.div_(self._divisor)

    def done(self) -> bool:
        """Return whether ``wait`` has only to decode."""
        return self._leaving is None or self._handle.done()


class Reduced:
    """An all-reduce under way: its second hop starts when the owner says so.

    Args:
        owner: sends, and remembers what was rounded away.
        collective: what was asked for.
    """

    def __init__(self, owner: CompressedCommunicator, collective: Collective) -> None:
        assert collective.output is not None and collective.input is not None
        flat, output = collective.input.view(-1), collective.output.view(-1)
        lossy = collective.lossy
        self._owner, self._collective, self._codec = owner, collective, owner.codec
        # Connected when it is issued, not when it is waited for: all ranks connect in the same order.
        self._way = owner.second(collective.dimension)
        self._output = output[:lossy]
        ranks = owner.size(collective.dimension)
        block = self._codec.block
        size = -(-lossy // (ranks * block)) * block
        whole = torch.zeros(ranks, size, device=flat.device)
        whole.view(-1)[:lossy].copy_(flat[:lossy])
        hop = Collective(
            operation="reduce_scatter",
            dimension=collective.dimension,
            input=whole,
            output=whole[0],
            reduction=collective.reduction,
            label=collective.label,
        )
        self._first: Scattered | None = Scattered(owner, hop, self._name(ranks))
        self._exact: Handle | None = None
        if lossy < flat.numel():
            rest = output[lossy:]
            if flat.data_ptr() != output.data_ptr():
                rest.copy_(flat[lossy:])
            self._exact = owner.inner.all_reduce(
                rest, collective.dimension, reduction=collective.reduction, label=f"{collective.label}, flags"
            )
        self._second: Handle | None = None
        self._mine: torch.Tensor | None = None
        self._all = torch.empty(0)

    def _name(self, ranks: int) -> str:
        """Return the name of what the first hop owes: only all data ranks together have one order of elements."""
        dimension, label = self._collective.dimension, self._collective.label
        return f"{WHOLE}{dimension}/{label}" if dimension in WHOLES else f"sent/{ranks}/{dimension}/{label}"

    @torch.no_grad()
    def second_hop(self) -> None:
        """Wait for the first, and send this rank's piece of the result to all."""
        assert self._first is not None
        piece = self._first.reduced().unsqueeze(0).contiguous()
        self._first = None
        collective, owner = self._collective, self._owner
        ranks = owner.size(collective.dimension)
        name = f"served/{ranks}/{collective.dimension}/{collective.label}"
        self._mine = owner.feedback.encode(name, piece, self._codec)
        self._size = piece.shape[1]
        self._all = torch.empty(ranks, self._mine.shape[1], dtype=torch.uint8, device=piece.device)
        self._second = owner.inner.all_gather(
            self._all.view(-1),
            self._mine.view(-1),
            self._way,
            label=f"{collective.label}, compressed again",
        )

    @torch.no_grad()
    def wait(self) -> None:
        """Return when the result is in place."""
        if self._first is not None:
            self._owner.go_on(self)
        if self._second is None:
            return
        self._second.wait()
        whole = torch.empty(len(self._all), self._size, device=self._output.device)
        self._codec.decode(self._all, whole)
        self._output.copy_(whole.view(-1)[: self._output.numel()])
        self._second = self._mine = None
        if self._exact is not None:
            self._exact.wait()

    def done(self) -> bool:
        """Return whether ``wait`` has only to decode."""
        if self._first is not None:
            return False
        return self._second is None or self._second.done()


def _padded(pieces: torch.Tensor, block: int) -> torch.Tensor:
    """Return a copy of ``pieces`` in fp32, each filled up to a multiple of the block with zeros."""
    rows, numel = pieces.shape
    size = -(-numel // block) * block
    result = torch.zeros(rows, size, device=pieces.device) if size > numel else torch.empty_like(pieces).float()
    result[:, :numel].copy_(pieces)
    return result
