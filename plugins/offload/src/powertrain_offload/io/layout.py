"""Where a byte of a striped file lies; ``cpp/file.h`` says the same."""

from __future__ import annotations

from collections.abc import Sequence


def span(offset: int, length: int, parts: int, stripe: int) -> tuple[int, int, int]:
    """Return what of ``length`` bytes from ``offset`` lies in one go: which part, the offset in it, and how much."""
    if parts == 1:
        return 0, offset, length
    number, within = divmod(offset, stripe)
    row, part = divmod(number, parts)
    return part, row * stripe + within, min(length, stripe - within)


def part_sizes(size: int, parts: int, stripe: int) -> list[int]:
    """Return the size of each part of a file of ``size`` bytes."""
    rows, rest = divmod(size, parts * stripe)
    return [rows * stripe + min(max(rest - part * stripe, 0), stripe) for part in range(parts)]


def whole_size(sizes: Sequence[int], stripe: int) -> int:
    """Return the size of a file from those of its parts: up to the last byte that any of them holds."""
    ends = [0]
    for part, size in enumerate(sizes):
        if size:
            row, within = divmod(size - 1, stripe)
            ends.append((row * len(sizes) + part) * stripe + within + 1)
    return sizes[0] if len(sizes) == 1 else max(ends)
