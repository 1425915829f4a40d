"""The wrapper that sends gradients compressed, whatever optimizer made them wanted and whoever shards them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch

from powertrain.errors import LaunchError
from powertrain.kernels.blockwise import FLOATS
from powertrain.roles.accelerator import Accelerator
from powertrain.roles.communicator import Collective, Communicator, Handle, Handles, WrappedCommunicator
from powertrain_comm.compress.codecs import Codec, codec_of
from powertrain_comm.compress.feedback import WHOLE, Feedback
from powertrain_comm.compress.reductions import Reduced, Scattered
from powertrain_comm.config import Compress

DEPTH = 2
"""Reductions whose first hop is on its way before the oldest one's second hop starts."""


class CompressedCommunicator(WrappedCommunicator):
    """Compresses what a ``Collective`` calls lossy, and passes everything else on.

    The second hop of an all-reduce starts with the ``DEPTH``-th reduction after it, or when somebody waits for it or
    a later one: in the order of the reductions, and on a dimension of its own, so that all ranks agree on the order
    although they do not wait at the same time.

    Args:
        inner: connects the ranks.
        table: the settings; ``method`` is not "none".
        accelerator: whose kernels quantize.

    Attributes:
        codec: turns elements into bytes; set while something is compressed.
        feedback: what was rounded away.
        compressed: collectives so far.
    """

    def __init__(self, inner: Communicator, table: Compress, accelerator: Accelerator) -> None:
        super().__init__(inner)
        self._table = table
        self._accelerator = accelerator
        self.feedback = Feedback(table.error_feedback)
        self._first_hop: deque[Reduced] = deque()
        self._seconds: dict[str, str] = {}
        self._method: str | None = None
        self.compressed = 0
        self._codecs: dict[str, Codec] = {}
        if table.method != "optimizer" and not table.after:
            self.use(table.method)

    def use(self, method: str | None) -> None:
        """Compress by ``method`` from now on; None: send exactly. All ranks change between the same collectives."""
        if method is not None and method not in self._codecs:
            self._codecs[method] = codec_of(method, self._table, self._accelerator)
        self._method = method

    @property
    def method(self) -> str | None:
        """The method in use; None while all is exact."""
        return self._method

    @property
    def codec(self) -> Codec:
        """The codec in use."""
        assert self._method is not None
        return self._codecs[self._method]

    def issue(self, collective: Collective) -> Handle:
        """Start one collective, compressed if it may be."""
        if not self._compresses(collective):
            return self.inner.issue(collective)
        self.compressed += 1
        if collective.operation == "reduce_scatter":
            return Scattered(self, collective)
        while len(self._first_hop) >= DEPTH:
            self._first_hop.popleft().second_hop()
        reduction = Reduced(self, collective)
        self._first_hop.append(reduction)
        return reduction

    def issue_together(self, collectives: Sequence[Collective]) -> Handle:
        """Start several collectives, together where none is compressed."""
        if any(self._compresses(one) for one in collectives):
            return Handles([self.issue(one) for one in collectives])
        return self.inner.issue_together(collectives)

    def _compresses(self, collective: Collective) -> bool:
        given, table = collective.input, self._table
        if self._method is None or given is None or not collective.lossy:
            return False
        if table.dimension is not None and collective.dimension != table.dimension:
            return False
        if given.dtype not in FLOATS or collective.reduction not in ("sum", "mean"):
            return False
        count = self.size(collective.dimension)
        pieces = count if collective.operation == "reduce_scatter" else 1
        if collective.lossy * pieces < table.least:
            return False
        # Of a piece, all or nothing: nobody who scatters puts anything exact behind gradients.
        whole = collective.operation == "all_reduce" or collective.lossy * count == given.numel()
        return count > 1 and whole

    def second(self, dimension: str) -> str:
        """Return the name of a connection of the same ranks along which second hops travel in their own order."""
        if dimension not in self._seconds:
            self._seconds[dimension] = self.inner.split(dimension, self.size(dimension))[0]
        return self._seconds[dimension]

    def go_on(self, last: Reduced) -> None:
        """Start the second hops of all reductions up to ``last``."""
        while self._first_hop:
            reduction = self._first_hop.popleft()
            reduction.second_hop()
            if reduction is last:
                return

    def state(self) -> dict[str, torch.Tensor]:
        """Return what this rank's compression still owes."""
        return {**self.inner.state(), **{f"compress/{k}": v for k, v in self.feedback.state().items()}}

    def wants(self, name: str) -> bool:
        """Return whether what is owed under a name can be paid back by as many ranks as there are."""
        owner, _, debt = name.partition("/")
        if owner != "compress":
            return self.inner.wants(name)
        kind, *rest = debt.split("/")
        if kind == WHOLE.rstrip("/"):
            return True
        try:
            return len(rest) > 1 and int(rest[0]) == self.size(rest[1])
        except (ValueError, LaunchError):  # this run has no such dimension
            return False

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Owe what ``state`` says."""
        own = {k.removeprefix("compress/"): v for k, v in state.items() if k.startswith("compress/")}
        self.feedback.load_state(own)
        self.inner.load_state({k: v for k, v in state.items() if not k.startswith("compress/")})

    def describe(self) -> dict[str, str]:
        """Return the wrapped communicator's facts, and how gradients travel."""
        return {**self.inner.describe(), "compress": self._table.method}
