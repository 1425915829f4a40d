"""Which algorithm carries out a collective over gloo, by operation and size.

A table is made of times, by a rule without a clock or chance in it: ranks that
have the same times choose alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import attrs

from powertrain.roles.communicator import Operation

Setting = Literal["measured", "pairwise", "gloo"]
"""What ``[comm] algorithms`` may say."""

Algorithm = Literal["pairwise", "gloo"]

Times = dict[str, dict[int, dict[str, float]]]
"""Seconds by operation, size class and algorithm."""

RULE: Mapping[Operation, Algorithm] = {"reduce_scatter": "pairwise", "all_gather": "pairwise", "all_reduce": "gloo"}
"""What is taken where nothing was measured."""

CLASSES = tuple((1 << 16) * 4**power for power in range(5))
"""Bytes of the whole tensor from which each class counts: 64 KiB to 16 MiB; the last one stands for all above."""

MARGIN = 1.15
"""How many times as fast as the rule's algorithm another one must be, to be worth a change that noise might undo."""

HELD = 16 * 2**20
"""Bytes that a direct all_reduce may receive on a rank: the whole tensor of each peer, unlike the other two."""


def possible(operation: Operation, nbytes: int, ranks: int) -> bool:
    """Return whether direct exchanges may carry ``operation`` out, whose whole tensor has ``nbytes``."""
    return operation in RULE and (operation != "all_reduce" or (ranks - 1) * nbytes <= HELD)


@attrs.frozen
class Table:
    """What carries out each operation of each size class; the rule, where it says nothing.

    Attributes:
        chosen: by operation and class.
        fixed: what carries out everything, whatever the rest says.
    """

    chosen: Mapping[tuple[Operation, int], Algorithm] = attrs.field(factory=dict)
    fixed: Algorithm | None = None

    @classmethod
    def from_times(cls, times: Times) -> Table:
        """Choose the faster of each two.

        A class that was not measured does as the next smaller one, but for all_reduce: there direct exchanges fall
        behind with size, as they move more.
        """
        chosen: dict[tuple[Operation, int], Algorithm] = {}
        for operation, rule in RULE.items():
            other: Algorithm = "gloo" if rule == "pairwise" else "pairwise"
            choice = rule
            for least in CLASSES:
                found = times.get(operation, {}).get(least, {})
                if rule in found and other in found:
                    choice = other if found[other] * MARGIN < found[rule] else rule
                elif operation == "all_reduce":
                    choice = rule
                chosen[operation, least] = choice
        return cls(chosen)

    @classmethod
    def pinned(cls, setting: Algorithm) -> Table:
        """Return the table that nobody measured: everything by gloo's own, or the rule."""
        return cls(fixed="gloo" if setting == "gloo" else None)

    def algorithm(self, operation: Operation, nbytes: int) -> Algorithm:
        """Return what carries out ``operation``, whose whole tensor has ``nbytes``."""
        if self.fixed is not None:
            return self.fixed
        rule = RULE.get(operation, "gloo")
        least = max((least for least in CLASSES if least <= nbytes), default=0)
        return self.chosen.get((operation, least), rule)

    def describe(self) -> str:
        """Return for people which operation goes by which algorithm from which size on."""
        words = []
        for operation in RULE:
            runs: list[str] = []
            last = ""
            for least in (0, *CLASSES):
                choice = self.algorithm(operation, least)
                if choice != last:
                    runs.append(choice + (f" from {least >> 10} KiB" if least else ""))
                last = choice
            words.append(f"{operation} {', '.join(runs)}")
        return "; ".join(words)


def times_from_json(value: Any) -> Times | None:
    """Return the times that ``times_to_json`` wrote; None where ``value`` is anything else."""
    if not isinstance(value, dict) or not value.keys() <= RULE.keys():
        return None
    times: Times = {}
    for operation, classes in value.items():
        if not isinstance(classes, dict):
            return None
        times[operation] = {}
        for least, found in classes.items():
            if least not in map(str, CLASSES) or not isinstance(found, dict) or not _are_seconds(found.values()):
                return None
            if not found.keys() <= {"pairwise", "gloo"}:
                return None
            times[operation][int(least)] = {name: float(seconds) for name, seconds in found.items()}
    return times


def times_to_json(times: Times) -> dict[str, Any]:
    """Return ``times`` as JSON has it, whose keys are text."""
    return {name: {str(least): dict(found) for least, found in rows.items()} for name, rows in times.items()}


def _are_seconds(values: Iterable[Any]) -> bool:
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        for value in values
    )
