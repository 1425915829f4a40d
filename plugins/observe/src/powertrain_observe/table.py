"""Traffic as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from powertrain.roles.communicator import Traffic

HEADINGS = (
    "operation", "dimension", "data", "calls", "MB sent", "ms", "exposed ms", "algorithm GB/s", "bus GB/s",
)  # fmt: skip
WORDS = 3
"""Columns of words; the others are numbers."""


def payload(traffic: Traffic, ranks: int) -> float:
    """Return the bytes of the whole tensors, from those sent: what an algorithm's bandwidth is counted by."""
    if ranks == 1:
        return 0.0
    share = {
        "all_reduce": 2 * (ranks - 1) / ranks,
        "all_gather": (ranks - 1) / ranks,
        "reduce_scatter": (ranks - 1) / ranks,
        "all_to_all": (ranks - 1) / ranks,
    }
    return traffic.bytes / share.get(traffic.operation, 1.0)


def render(rows: Sequence[Traffic], size: Callable[[str], int]) -> str:
    """Return one line per row, under headings.

    Args:
        rows: what was counted.
        size: ranks along a dimension.
    """
    if not rows:
        return ""
    cells: list[tuple[str, ...]] = [HEADINGS]
    for row in rows:
        timed = row.seconds > 0
        cells.append(
            (
                row.operation,
                row.dimension,
                row.data or "-",
                str(row.calls),
                f"{row.bytes / 1e6:.3f}",
                f"{row.seconds * 1e3:.1f}" if timed else "-",
                f"{row.exposed * 1e3:.1f}" if timed else "-",
                f"{payload(row, size(row.dimension)) / row.seconds / 1e9:.2f}" if timed and row.bytes else "-",
                f"{row.bytes / row.seconds / 1e9:.2f}" if timed and row.bytes else "-",
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < WORDS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
