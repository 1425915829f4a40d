"""The wrapper that counts and times what a rank sends."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import attrs

from powertrain.roles.communicator import Collective, Communicator, Handle, Operation, Traffic, WrappedCommunicator
from powertrain_observe.clock import DeviceClock, DeviceTimed, HostTimed
from powertrain_observe.table import render

_log = logging.getLogger("powertrain.observe")

ROWS = 256
"""Rows of the table, before labels that are new are no longer told apart."""

Key = tuple[Operation, str, str]


@attrs.define(slots=True)
class Row:
    """What was counted of one kind of collective; times are in seconds."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0
    exposed: float = 0.0


class TracedCommunicator(WrappedCommunicator):
    """Counts and times the collectives of another communicator, and the bytes that they make this rank send.

    Each operation counts with what its best algorithm sends, as ``Traffic`` says, whatever the library does.
    Labels are told apart by what they say of the data, up to a name or a number.
    """

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self._rows: dict[Key, Row] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._clock = None if inner.device.type == "cpu" else DeviceClock(inner.device)
        self._open = True

    def issue(self, collective: Collective) -> Handle:
        """Start one collective, count it, and time it."""
        if self._clock is not None:
            issued = self._clock.event()
            handle = self.inner.issue(collective)
            return DeviceTimed(handle, self._count(collective), self._clock, issued)
        started = time.perf_counter()
        handle = self.inner.issue(collective)
        return HostTimed(handle, self._count(collective), started)

    def issue_together(self, collectives: Sequence[Collective]) -> Handle:
        """Start several collectives and count each; the time is that of all, and goes to the first."""
        issued, started = self._clock and self._clock.event(), time.perf_counter()
        handle = self.inner.issue_together(collectives)
        rows = [self._count(collective) for collective in collectives]
        if not rows:
            return handle
        if self._clock is not None:
            return DeviceTimed(handle, rows[0], self._clock, issued)
        return HostTimed(handle, rows[0], started)

    def _count(self, collective: Collective) -> Row:
        dimension = collective.dimension
        place = self._places.get(dimension)
        if place is None:
            place = self._places[dimension] = self.size(dimension), self.index(dimension)
        key = collective.operation, dimension, kind_of(collective.label)
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= ROWS:
                key = collective.operation, dimension, ""
            row = self._rows.setdefault(key, Row())
        row.calls += 1
        row.bytes += sent(collective, *place)
        return row

    def traffic(self) -> list[Traffic]:
        """Return what was counted, by operation, dimension and kind of data."""
        if self._clock is not None:
            self._clock.settle()
        return [
            Traffic(operation=operation, dimension=dimension, data=data, **attrs.asdict(row))
            for (operation, dimension, data), row in sorted(self._rows.copy().items())
        ]

    def table(self) -> str:
        """Return what was counted, one line per operation, dimension and kind of data."""
        return render(self.traffic(), self.size)

    def describe(self) -> dict[str, str]:
        """Return the wrapped communicator's facts, and that it is traced."""
        return {**self.inner.describe(), "trace": "on"}

    def close(self) -> None:
        """Log the table on rank 0, then close the wrapped communicator."""
        if self._open and self.rank == 0 and self._rows:
            _log.info("collectives of rank 0:\n%s", self.table())
        self._open = False
        self.inner.close()


def kind_of(label: str) -> str:
    """Return what a label says of the data, without the names and numbers of this one."""
    result = []
    for word in label.split():
        plain = word.rstrip(",:?")
        if not plain.isalpha() or plain == "of":
            break
        result.append(plain)
        if word != plain:
            break
    return " ".join(result) or label.partition(" ")[0].partition(".")[0]


def sent(collective: Collective, count: int, index: int) -> int:
    """Return the bytes that ``collective`` makes index ``index`` of ``count`` send to others; see ``Traffic``."""
    tensor, operation = collective.input, collective.operation
    if tensor is None or count == 1:
        return 0
    nbytes = tensor.nbytes
    if operation == "all_gather":
        return nbytes * (count - 1)
    if operation == "all_reduce":
        return 2 * nbytes * (count - 1) // count
    if operation == "broadcast":
        return nbytes if collective.peer == index else 0
    if operation == "all_to_all" and collective.input_splits is not None:
        rows = len(tensor)
        return nbytes // rows * (rows - collective.input_splits[index]) if rows else 0
    if operation in ("reduce_scatter", "all_to_all"):
        return nbytes * (count - 1) // count
    return nbytes  # a send
