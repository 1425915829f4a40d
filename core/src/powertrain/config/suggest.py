"""Finds what a misspelt word was meant to be."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(word: str, candidates: Iterable[str]) -> list[str]:
    """Return the candidates that ``word`` may have been meant to be, best first, at most three.

    Candidates within about a third of the word's length in edits are near; the nearest are returned, several
    only when they are equally near. Failing that, candidates that contain the word or are contained in it.
    """
    plain = _plain(word)
    distances = {candidate: distance(plain, _plain(candidate)) for candidate in candidates}
    near = {
        candidate: edits
        for candidate, edits in distances.items()
        if edits <= max(1, (max(len(word), len(candidate)) + 1) // 3)
    }
    if near:
        least = min(near.values())
        return sorted(candidate for candidate, edits in near.items() if edits == least)[:3]
    parts = [c for c in distances if min(len(c), len(word)) >= 3 and (_plain(c) in plain or plain in _plain(c))]
    return sorted(parts, key=lambda c: (distances[c], c))[:1]


def distance(a: str, b: str) -> int:
    """Count the insertions, deletions, replacements and swaps of neighbours that turn ``a`` into ``b``.

    The optimal string alignment distance: no substring is edited twice.
    """
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, older[j - 2] + 1)
            row.append(best)
    return row[-1]


def _plain(word: str) -> str:
    return word.casefold().replace("-", "_")
