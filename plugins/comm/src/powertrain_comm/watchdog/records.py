"""What a rank remembers of its collectives."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Any

import torch

from powertrain.roles.communicator import Collective, Handle
from powertrain_comm.watchdog.sites import Site, SiteFinder, show

KEPT = 256
"""Collectives that are remembered."""

KINDS = 4096
"""Kinds of collectives that are remembered, before all are forgotten and met anew."""


class Kind:
    """What all occurrences of one collective, at one place in the code, have in common; it keeps no tensor alive.

    Attributes:
        page: which filling of the black box describes it; 0 for none.
        start: where there.
        length: how long, in bytes.
    """

    __slots__ = (
        "dimension", "dtype", "label", "length", "operation", "page", "peer", "reduction", "shape", "site", "start",
    )  # fmt: skip

    def __init__(
        self, collective: Collective, shape: Sequence[int] | None, dtype: torch.dtype | None, site: Site
    ) -> None:
        self.operation = collective.operation
        self.dimension = collective.dimension
        self.peer = collective.peer
        self.reduction = collective.reduction
        self.label = collective.label
        self.shape: Sequence[int] = () if shape is None else shape
        self.dtype = dtype
        self.site = site
        self.page = self.start = self.length = 0

    @property
    def joint(self) -> bool:
        """Whether all ranks along the dimension take part."""
        return self.operation not in ("send", "receive")

    def facts(self) -> dict[str, Any]:
        """Return it as JSON."""
        reduces = self.operation in ("all_reduce", "reduce_scatter")
        return {
            "operation": self.operation,
            "dimension": self.dimension,
            "peer": self.peer,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else "",
            "reduction": self.reduction if reduces else "",
            "label": self.label,
            "site": show(self.site),
        }


class Record:
    """One collective that this rank issued.

    Attributes:
        number: counted from 1 along its dimension (for send and receive: per peer).
        started: seconds on the monotonic clock.
        finished: whether it is over, as far as is known.
        silent: whether only waiting tells if it is over, and nobody waits for it; nothing is concluded from it then.
        handle: the inner handle while it is pending.
    """

    __slots__ = ("finished", "handle", "kind", "number", "silent", "started")

    def __init__(self, number: int, kind: Kind) -> None:
        self.number = number
        self.kind = kind
        self.started = monotonic()
        self.finished = False
        self.silent = False
        self.handle: Handle | None = None

    def pend(self, handle: Handle) -> None:
        """Note that it has started."""
        self.handle = handle
        self.silent = is_silent(handle)

    def expect(self) -> None:
        """Note that somebody waits for it: what was silent until now has its time from here."""
        if self.silent:
            self.started = monotonic()  # first: the watchdog reads both, from its own thread
            self.silent = False

    def facts(self, now: float) -> dict[str, Any]:
        """Return it as JSON."""
        age = round(now - self.started, 1)
        return {
            **self.kind.facts(),
            "number": self.number,
            "age": age,
            "waiting": not self.finished and not self.silent,
        }


def is_silent(handle: Handle) -> bool:
    """Return whether ``handle.done()`` stays false, although all is over, until somebody waits."""
    return bool(getattr(handle, "silent", False))


class Ledger:
    """The collectives of one communicator: the last ones, and those under way.

    One thread adds records; another may read them.
    """

    def __init__(self) -> None:
        self.sites = SiteFinder()
        self.begun = 0
        self._kinds: dict[object, Kind] = {}
        self._counts: dict[object, int] = {}
        self._recent: deque[Record] = deque(maxlen=KEPT)
        self._pending: deque[Record] = deque()

    def begin(self, collective: Collective) -> Record:
        """Record a collective that the caller's caller issues."""
        tensor = collective.output if collective.input is None else collective.input
        shape = dtype = None
        if tensor is not None:
            shape, dtype = tensor.shape, tensor.dtype
        operation, dimension, peer, label = (
            collective.operation,
            collective.dimension,
            collective.peer,
            collective.label,
        )
        site = self.sites.find(2)
        key = (operation, dimension, peer, collective.reduction, label, shape, dtype, site)
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) >= KINDS:
                self._kinds.clear()
            kind = self._kinds[key] = Kind(collective, shape, dtype, site)
        series: object = dimension if kind.joint else (operation, dimension, peer)
        number = self._counts[series] = self._counts.get(series, 0) + 1
        record = Record(number, kind)
        pending = self._pending
        while pending and pending[0].finished:
            pending.popleft()
        pending.append(record)
        self._recent.append(record)
        self.begun += 1
        return record

    def oldest(self) -> Record | None:
        """Return the oldest collective known to be under way, having asked the handles which are over."""
        first = None
        for record in self._pending.copy():
            handle = record.handle
            if not record.finished and handle is not None and handle.done():
                record.finished, record.handle = True, None
            if first is None and not record.finished and not record.silent:
                first = record
        return first

    def state(self, last: int = KEPT) -> dict[str, Any]:
        """Return the last records and what the main thread does, as JSON."""
        now = monotonic()
        recent = list(self._recent.copy())[-last:]
        shown = {id(record) for record in recent}
        waiting = [record for record in self._pending.copy() if not record.finished and id(record) not in shown]
        counts = {key: count for key, count in self._counts.copy().items() if isinstance(key, str)}
        return {
            "records": [record.facts(now) for record in waiting[:last] + recent],
            "counts": counts,
            "now": self.sites.now(),
        }
