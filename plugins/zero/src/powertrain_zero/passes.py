"""The order in which a forward pass gathers units: found in the first pass, kept in all later ones.

In the first pass of its kind the ranks tell one another, each time one of them
needs a unit, which units those are, so that all take part whatever branch each
takes. From then on the order is fixed: a rank that skips a unit gathers it all
the same when it comes to the next, and frees it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from powertrain.roles.communicator import Communicator
from powertrain_zero.unit import Unit

NOTHING = -1
"""What a rank asks for when its pass is over."""


class Ballot:
    """Lets the ranks of a dimension exchange one small number each."""

    def __init__(self, communicator: Communicator, dimension: str) -> None:
        self._communicator = communicator
        self._dimension = dimension

    def __call__(self, mine: int, label: str) -> list[int]:
        """Return every rank's number, in order of index; each rank must call it."""
        device = self._communicator.device
        count = self._communicator.size(self._dimension)
        everyone = torch.empty(count, dtype=torch.int64, device=device)
        given = torch.tensor([mine], dtype=torch.int64, device=device)
        self._communicator.all_gather(everyone, given, self._dimension, label=label).wait()
        return [int(value) for value in everyone.tolist()]


class FirstPass:
    """A forward pass whose order is not known yet.

    Args:
        units: all units, in the order of registration.
        ballot: tells the ranks what each needs.
    """

    def __init__(self, units: Sequence[Unit], ballot: Ballot) -> None:
        self._units = list(units)
        self._number = {unit: number for number, unit in enumerate(units)}
        self._ballot = ballot
        self.order: list[Unit] = []

    def demand(self, unit: Unit) -> None:
        """Bring ``unit`` here, and what other ranks need at the same time."""
        if not unit.here:
            self._round(self._number[unit])
        unit.wait()

    def _round(self, wanted: int) -> bool:
        """Gather what any rank wants; return whether any wants something."""
        asked = sorted(set(self._ballot(wanted, "which unit comes next")) - {NOTHING})
        before = [number for number in asked if self._units[number].here]
        for number in asked:
            unit = self._units[number]
            unit.gather()
            if unit not in self.order:
                self.order.append(unit)
        for number in asked:
            unit = self._units[number]
            unit.wait()
            if number != wanted and number not in before and not unit.plan.whole_pass:
                unit.release()
        return bool(asked)

    def finish(self) -> list[Unit]:
        """Serve the other ranks until all are through; return the order for the passes to come."""
        while self._round(NOTHING):
            pass
        return with_siblings(self.order, self._units)


def with_siblings(order: Sequence[Unit], units: Sequence[Unit]) -> list[Unit]:
    """Add the units that did not run but stand in one list with some that did: they may run next time.

    Args:
        order: what ran.
        units: all, in the order of registration.
    """
    result = list(order)
    for before, unit in zip([None, *units], units, strict=False):
        if unit in result or before is None or before not in result:
            continue
        if _parent(before) == _parent(unit):
            result.insert(result.index(before) + 1, unit)
    return result


def _parent(unit: Unit) -> str:
    return unit.plan.paths[0].rpartition(".")[0] if not unit.plan.whole_pass else "\0"


class KnownPass:
    """A forward pass in a fixed order.

    Args:
        order: the units, each once.
        prefetch: how many are gathered ahead of the one that runs.
    """

    def __init__(self, order: Sequence[Unit], prefetch: int) -> None:
        self.order = list(order)
        self._place = {unit: place for place, unit in enumerate(order)}
        self._prefetch = prefetch
        self._next = 0
        self._ahead: list[Unit] = []

    @property
    def last(self) -> Unit | None:
        """The unit that backward needs first: to free it between the two would be in vain."""
        inner = [unit for unit in self.order if not unit.plan.whole_pass]
        return inner[-1] if inner else None

    def demand(self, unit: Unit) -> None:
        """Bring ``unit`` here; start those that come next."""
        place = self._place.get(unit)
        if place is not None and place >= self._next:
            self._start(place + 1)
        elif not unit.here:
            unit.gather()  # again, or out of order
        if unit in self._ahead:
            self._ahead.remove(unit)
        if place is not None:
            for other in [other for other in self._ahead if self._place[other] < place]:
                self._ahead.remove(other)  # this rank skips it
                if not other.plan.whole_pass:
                    other.release()
            self._start(min(place + 1 + self._prefetch, len(self.order)))
        unit.wait()

    def _start(self, stop: int) -> None:
        while self._next < stop:
            unit = self.order[self._next]
            self._next += 1
            if not unit.here:
                unit.gather()
                self._ahead.append(unit)

    def finish(self, keep: Unit | None) -> list[Unit]:
        """Take part in what other ranks may still gather; free all of it but ``keep``."""
        self._start(len(self.order))
        for unit in self._ahead:
            unit.wait()
            if unit is not keep and not unit.plan.whole_pass:
                unit.release()
        self._ahead.clear()
        return self.order
