"""How gradients travel quantized: all-to-all in two hops, summed in fp32 between them (qgZ).

"ZeRO++" (Wang et al., arXiv 2306.10209), section 3.3. A ring would quantize a
sum once a rank; here each element is quantized twice at most, and what crosses
nodes has been summed within the node before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from powertrain.kernels.blockwise import Blockwise
from powertrain.roles.communicator import Communicator, Handle


class QuantizedReduce:
    """The mean of quantized gradients, in one hop or two.

    The second hop of a reduction starts with the next reduction, or when somebody
    waits for it or a later one: in the order of the reductions, on a dimension of
    its own, so that all ranks agree on the order although they do not wait at the
    same time.

    Args:
        communicator: connects the ranks.
        hops: one dimension; or those within and across nodes, as ``Communicator.split`` returned them.
        codec: how elements become bytes; shards are multiples of its block.
    """

    def __init__(self, communicator: Communicator, hops: Sequence[str], codec: Blockwise) -> None:
        self.communicator = communicator
        self.hops = tuple(hops)
        self.codec = codec
        self._first_hop: deque[_Reduction] = deque()

    def reduce(self, output: torch.Tensor, whole: torch.Tensor, label: str) -> Handle:
        """Start the first hop; ``wait`` does the rest. ``whole`` may be reused at once."""
        self.go_on()
        reduction = _Reduction(self, output, whole, label)
        if len(self.hops) > 1:
            self._first_hop.append(reduction)
        return reduction

    def holds(self, reduction: _Reduction) -> bool:
        """Return whether the second hop of ``reduction`` is still to be started."""
        return reduction in self._first_hop

    def go_on(self, last: _Reduction | None = None) -> None:
        """Start the second hop of all reductions up to ``last``; of all without it."""
        if last is not None and not self.holds(last):
            return
        while self._first_hop:
            reduction = self._first_hop.popleft()
            reduction.second_hop()
            if reduction is last:
                return


class _Reduction:
    """One buffer's gradients under way.

    Ranks are numbered ``node x place``: the shard of rank ``(a, l)`` is piece
    ``a * places + l``. The first hop brings each rank the pieces of all that stand
    at its place of any node, the second its own.

    Args:
        wire: whose reduction it is.
        output: takes this rank's piece of the mean.
        whole: all pieces.
        label: for people.
    """

    def __init__(self, wire: QuantizedReduce, output: torch.Tensor, whole: torch.Tensor, label: str) -> None:
        self._wire = wire
        self._output = output
        self._label = label
        sizes = [wire.communicator.size(hop) for hop in wire.hops]
        places, self._nodes = sizes[0], sizes[1] if len(sizes) > 1 else 1
        self._ranks = places * self._nodes
        pieces = whole.view(self._nodes, places, -1)
        self._handle, self._arriving = self._exchange(pieces.transpose(0, 1), wire.hops[0], "quantized")
        self._over = False

    def _exchange(self, pieces: torch.Tensor, hop: str, note: str) -> tuple[Handle, torch.Tensor]:
        """Send ``pieces[i]`` to index i; return the handle, and where theirs arrive."""
        self._leaving = given = self._wire.codec.encode(pieces)  # kept until all of it has been sent
        taken = torch.empty_like(given)
        label = f"{self._label}, {note}"
        return self._wire.communicator.all_to_all(taken.view(-1), given.view(-1), hop, label=label), taken

    def _arrived(self) -> torch.Tensor:
        """Wait for a hop; return the sum of what came, in the order of the senders."""
        self._handle.wait()
        first, *others = self._arriving.unbind(0)
        total = torch.empty(*first.shape[:-1], self._output.numel(), dtype=torch.float32, device=first.device)
        self._wire.codec.decode(first, total)
        for rows in others:
            self._wire.codec.accumulate(rows, total)
        return total

    @torch.no_grad()
    def second_hop(self) -> None:
        """Send the sums of this node across."""
        total = self._arrived()
        self._handle, self._arriving = self._exchange(total, self._wire.hops[1], "quantized, across nodes")

    @torch.no_grad()
    def wait(self) -> None:
        """Return when ``output`` holds the mean."""
        if self._over:
            return
        self._wire.go_on(self)
        # One hop brought (peers, 1, bytes), two (peers, bytes).
        self._output.copy_(self._arrived().view(-1).div_(self._ranks))
        self._over = True
        del self._leaving, self._arriving

    def done(self) -> bool:
        """Return whether ``wait`` has nothing to wait for and to send."""
        return self._over or (self._handle.done() and not self._wire.holds(self))
