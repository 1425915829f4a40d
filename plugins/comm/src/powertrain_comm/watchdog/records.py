"""What a rank remembers of its collectives."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from powertrain.roles.communicator import Collective, Handle
from powertrain_comm.watchdog.sites import Site, SiteFinder, show

KEPT = 256
"""Collectives that are remembered."""


class Record:
    """One collective that this rank issued; it keeps no tensor alive.

    Attributes:
        number: counted from 1 along its dimension (for send and receive: per peer).
        started: seconds on the monotonic clock.
        finished: whether it is over, as far as is known.
        handle: the inner handle while it is pending.
    """

    __slots__ = (
        "dimension", "dtype", "finished", "handle", "label", "number", "operation", "peer", "reduction", "shape",
        "site", "started",
    )  # fmt: skip

    def __init__(self, number: int, collective: Collective, site: Site) -> None:
        tensor = collective.input
        if tensor is None:
            tensor = collective.output
        self.number = number
        self.operation = collective.operation
        self.dimension = collective.dimension
        self.peer = collective.peer
        self.reduction = collective.reduction
        self.label = collective.label
        self.site = site
        self.shape: Sequence[int] = () if tensor is None else tensor.shape
        self.dtype: torch.dtype | None = None if tensor is None else tensor.dtype
        self.started = time.monotonic()
        self.finished = False
        self.handle: Handle | None = None

    def facts(self, now: float) -> dict[str, Any]:
        """Return it as JSON."""
        reduces = self.operation in ("all_reduce", "reduce_scatter")
        return {
            "number": self.number,
            "operation": self.operation,
            "dimension": self.dimension,
            "peer": self.peer,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else "",
            "reduction": self.reduction if reduces else "",
            "label": self.label,
            "site": show(self.site),
            "age": round(now - self.started, 1),
            "waiting": not self.finished,
        }


class Ledger:
    """The collectives of one communicator: the last ones, and those under way.

    One thread adds records; another may read them.
    """

    def __init__(self) -> None:
        self.sites = SiteFinder()
        self.begun = 0
        self._counts: dict[object, int] = {}
        self._recent: deque[Record] = deque(maxlen=KEPT)
        self._pending: deque[Record] = deque()

    def begin(self, collective: Collective, depth: int = 1) -> Record:
        """Record a collective that the frame ``depth`` above the caller issues."""
        key: object = collective.dimension
        if collective.operation in ("send", "receive"):
            key = (collective.operation, collective.dimension, collective.peer)
        number = self._counts[key] = self._counts.get(key, 0) + 1
        record = Record(number, collective, self.sites.find(depth + 1))
        pending = self._pending
        while pending and pending[0].finished:
            pending.popleft()
        pending.append(record)
        self._recent.append(record)
        self.begun += 1
        return record

    def oldest(self) -> Record | None:
        """Return the oldest collective under way, having asked the handles which are over."""
        first = None
        for record in self._pending.copy():
            handle = record.handle
            if not record.finished and handle is not None and handle.done():
                record.finished, record.handle = True, None
            if first is None and not record.finished:
                first = record
        return first

    def state(self, last: int = KEPT) -> dict[str, Any]:
        """Return the last records and what the main thread does, as JSON."""
        now = time.monotonic()
        recent = list(self._recent.copy())[-last:]
        shown = {id(record) for record in recent}
        waiting = [record for record in self._pending.copy() if not record.finished and id(record) not in shown]
        counts = {key: count for key, count in self._counts.copy().items() if isinstance(key, str)}
        return {
            "records": [record.facts(now) for record in waiting[:last] + recent],
            "counts": counts,
            "now": self.sites.now(),
        }
