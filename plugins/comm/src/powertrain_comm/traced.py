"""The wrapper that counts what a rank sends."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from powertrain.roles.communicator import Collective, Communicator, Handle, Operation, Traffic, WrappedCommunicator

_log = logging.getLogger("powertrain.comm")

ROWS = 256
"""Rows of the table, before labels that are new are no longer told apart."""

HEADINGS = ("operation", "dimension", "label", "calls", "MB sent")

Row = tuple[Operation, str, str]


class TracedCommunicator(WrappedCommunicator):
    """Counts the collectives of another communicator, and the bytes that they make this rank send.

    Each operation counts with what its best algorithm sends, as ``Traffic`` says, whatever the library does.
    The table that ``close`` logs on rank 0 tells labels apart by their first word.
    """

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self._rows: dict[Row, list[int]] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._open = True

    def issue(self, collective: Collective) -> Handle:
        """Start one collective and count it."""
        handle = self.inner.issue(collective)
        self._count(collective)
        return handle

    def issue_together(self, collectives: Sequence[Collective]) -> Handle:
        """Start several collectives and count each."""
        handle = self.inner.issue_together(collectives)
        for collective in collectives:
            self._count(collective)
        return handle

    def _count(self, collective: Collective) -> None:
        dimension = collective.dimension
        place = self._places.get(dimension)
        if place is None:
            place = self._places[dimension] = self.size(dimension), self.index(dimension)
        key = collective.operation, dimension, collective.label.partition(" ")[0].partition(".")[0]
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= ROWS:
                key = collective.operation, dimension, ""
            row = self._rows.setdefault(key, [0, 0])
        row[0] += 1
        row[1] += sent(collective, *place)

    def traffic(self) -> list[Traffic]:
        """Return what was counted, by operation and dimension."""
        totals: dict[tuple[Operation, str], list[int]] = {}
        for (operation, dimension, _), (calls, nbytes) in self._rows.copy().items():
            total = totals.setdefault((operation, dimension), [0, 0])
            total[0] += calls
            total[1] += nbytes
        return [
            Traffic(operation=operation, dimension=dimension, calls=calls, bytes=nbytes)
            for (operation, dimension), (calls, nbytes) in sorted(totals.items())
        ]

    def table(self) -> str:
        """Return what was counted, one line per operation, dimension and first word of the label."""
        rows: list[tuple[str, ...]] = [HEADINGS]
        for (*names, label), (calls, nbytes) in sorted(self._rows.items()):
            rows.append((*names, label or "-", str(calls), f"{nbytes / 1e6:.3f}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column > 2 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )

    def describe(self) -> dict[str, str]:
        """Return the wrapped communicator's facts, and that it is traced."""
        return {**self.inner.describe(), "trace": "on"}

    def close(self) -> None:
        """Log the table on rank 0, then close the wrapped communicator."""
        if self._open and self.rank == 0 and self._rows:
            _log.info("what rank 0 sent to other ranks:\n%s", self.table())
        self._open = False
        self.inner.close()


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
