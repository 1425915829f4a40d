"""The order in which a forward pass gathers units: found in the first pass, kept in all later ones.

In the first pass of its kind the ranks tell one another, each time one of them
needs a unit, which unit that is, so that all take part whatever branch each
takes. From then on the order is fixed: a rank that skips a unit gathers it all
the same when it comes to the next, and frees it. A rank that needs a unit out of
that order, because a batch takes another way than any before, first works through
the rest of the order; at its end all ranks meet, and those that are through serve
the others until nobody needs anything. The order then grows, or the unit stays
until the pass is over from now on, so that this way is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import attrs
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


def join(unit: Unit) -> None:
    """Take part in gathering a unit although it may be here: what is collective must not depend on that."""
    if unit.here:
        unit.release()
        unit.gather()
        unit.wait()
    else:
        unit.gather()


@attrs.frozen
class Found:
    """What a round gathered.

    Attributes:
        unit: it.
        place: how far in a known order the rank was that needed it.
    """

    unit: Unit
    place: int


class Rounds:
    """Gathers what no known order foresees: round by round, the ranks say what each needs.

    Args:
        units: all units, in the order of registration.
        ballot: tells the ranks what each needs.
        put_away: frees a unit that this rank does not need.
    """

    def __init__(self, units: Sequence[Unit], ballot: Ballot, put_away: Callable[[Unit], None]) -> None:
        self._units = list(units)
        self._number = {unit: number for number, unit in enumerate(units)}
        self._ballot = ballot
        self._put_away = put_away

    def bring(self, unit: Unit, place: int = 0) -> list[Found]:
        """Bring ``unit`` here; return what all rounds until then gathered."""
        gathered = []
        while not unit.here and (found := self.take_part(unit, place)) is not None:
            gathered.append(found)
        unit.wait()
        return gathered

    def take_part(self, unit: Unit | None, place: int = 0) -> Found | None:
        """Gather the first of the units that any rank needs now; return it, or None when no rank needs one.

        One unit a round, that of the rank that is least far, then the first in the order of registration: who
        is ahead waits, and ranks of which one has skipped a unit meet again.

        Args:
            unit: what this rank needs; None when it is through.
            place: how far it is in a known order.
        """
        mine = NOTHING if unit is None else place * len(self._units) + self._number[unit]
        asked = set(self._ballot(mine, "which unit comes next")) - {NOTHING}
        if not asked:
            return None
        first, number = divmod(min(asked), len(self._units))
        found = self._units[number]
        was_here = found.here
        join(found)
        if found is unit or was_here or found.plan.whole_pass:
            found.wait()
        else:
            self._put_away(found)
        return Found(found, first)


class FirstPass:
    """A forward pass whose order is not known yet.

    Args:
        units: all units, in the order of registration.
        rounds: gathers what any rank needs.
    """

    def __init__(self, units: Sequence[Unit], rounds: Rounds) -> None:
        self._units = list(units)
        self._rounds = rounds
        self.order: list[Unit] = []

    def stays(self, unit: Unit) -> bool:
        """Return whether a unit that has run is kept, by this rule the same on all ranks."""
        return False

    def demand(self, unit: Unit) -> None:
        """Bring ``unit`` here, and what other ranks need before."""
        for found in self._rounds.bring(unit):
            self._note(found.unit)

    def finish(self) -> list[Unit]:
        """Serve the other ranks until all are through; return the order for the passes to come."""
        while (found := self._rounds.take_part(None)) is not None:
            self._note(found.unit)
        return with_siblings(self.order, self._units)

    def _note(self, unit: Unit) -> None:
        if unit not in self.order:
            self.order.append(unit)
        elif not unit.plan.whole_pass:
            # Some rank came to it twice, or ranks came to it in different orders. All have seen it.
            unit.repeated = True


def with_siblings(order: Sequence[Unit], units: Sequence[Unit]) -> list[Unit]:
    """Add the units that did not run but are like some that did: they may run next time.

    Args:
        order: what ran.
        units: all, in the order of registration.
    """
    result = list(order)
    ran = [unit for unit in units if unit in result]
    for number, unit in enumerate(units):
        if unit in result or unit.plan.whole_pass or not any(_alike(unit, other) for other in ran):
            continue
        before = [other for other in reversed(units[:number]) if other in result]
        after = [other for other in units[number + 1 :] if other in result]
        # As it would run: beside its neighbours in the list, else first in what contains it, else as its likes do.
        if neighbour := next((other for other in before if _siblings(unit, other)), None):
            result.insert(_end_of(neighbour, result), unit)
        elif neighbour := next((other for other in after if _siblings(unit, other)), None):
            result.insert(result.index(neighbour), unit)
        elif container := next((other for other in before if _contains(other, unit)), None):
            result.insert(result.index(container) + 1, unit)
        elif like := next((other for other in before if _alike(unit, other)), None):
            result.insert(_end_of(like, result), unit)
        else:
            result.insert(result.index(next(other for other in after if _alike(unit, other))), unit)
    return result


def _path(unit: Unit) -> str:
    return unit.plan.paths[0]


def _siblings(one: Unit, other: Unit) -> bool:
    return not other.plan.whole_pass and _path(one).rpartition(".")[0] == _path(other).rpartition(".")[0]


def _alike(one: Unit, other: Unit) -> bool:
    """Return whether two units stand in one list, or at the same place in members of one."""
    return _siblings(one, other) or (not other.plan.whole_pass and _pattern(_path(one)) == _pattern(_path(other)))


def _contains(outer: Unit, inner: Unit) -> bool:
    return not outer.plan.whole_pass and _path(inner).startswith(_path(outer) + ".")


def _end_of(unit: Unit, order: Sequence[Unit]) -> int:
    """Return the place after a unit and all that it contains."""
    return 1 + max(place for place, other in enumerate(order) if other is unit or _contains(unit, other))


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "#", path)


class KnownPass:
    """A forward pass in a fixed order.

    Args:
        order: the units, each once.
        prefetch: how many are gathered ahead of the one that runs.
        rounds: gathers what is needed out of order.
        put_away: frees a unit that this rank skips.
        stays: whether a unit that has run is kept; the same on all ranks.
    """

    def __init__(
        self,
        order: Sequence[Unit],
        prefetch: int,
        *,
        rounds: Rounds,
        put_away: Callable[[Unit], None],
        stays: Callable[[Unit], bool],
    ) -> None:
        self.order = list(order)
        self._place = {unit: place for place, unit in enumerate(order)}
        self._prefetch = prefetch
        self._rounds = rounds
        self._put_away = put_away
        self._stays = stays
        self._next = 0
        self._passed = 0
        self._ahead: list[Unit] = []
        self._found: list[Found] = []

    @property
    def last(self) -> Unit | None:
        """The unit that backward needs first: to free it between the two would be in vain."""
        inner = [unit for unit in self.order if not unit.plan.whole_pass]
        return inner[-1] if inner else None

    def stays(self, unit: Unit) -> bool:
        """Return whether a unit that has run is kept, by this rule the same on all ranks."""
        return self._stays(unit)

    def expects(self, unit: Unit) -> bool:
        """Return whether a unit was gathered ahead and has not run yet."""
        return unit in self._ahead

    def demand(self, unit: Unit) -> None:
        """Bring ``unit`` here; start those that come next."""
        place = self._place.get(unit)
        if place is not None:
            self._passed = max(self._passed, place + 1)
            self._start(place + 1)
            self._skip_before(place, unit)
        if unit in self._ahead:
            self._ahead.remove(unit)
        if unit.here:
            if place is not None:
                self._start(place + 1 + self._prefetch)
            unit.wait()
            return
        self._run_out()
        for found in self._rounds.bring(unit, self._passed):
            self._note(found)

    def finish(self) -> list[Unit]:
        """Take part in what other ranks may still gather, and put it away; return the order for the passes to come."""
        self._run_out()
        while (found := self._rounds.take_part(None)) is not None:
            self._note(found)
        order = list(self.order)
        inserted: list[int] = []
        for found in self._found:
            if found.unit not in order:
                order.insert(found.place + sum(place <= found.place for place in inserted), found.unit)
                inserted.append(found.place)
        return order

    def _run_out(self) -> None:
        """Gather what is left of the order, and put it away: at its end all ranks meet."""
        for place in range(self._next, len(self.order)):
            self._start(place + 1 + self._prefetch)
            self._skip_before(place + 1)
        self._skip_before(len(self.order))

    def _note(self, found: Found) -> None:
        """Remember what some rank needed out of order; all ranks have seen it."""
        unit = found.unit
        # The first only: what comes after it is out of order because of it.
        if not self._found and unit in self._place and not unit.plan.whole_pass:
            unit.repeated = True
        self._found.append(found)

    def _start(self, stop: int) -> None:
        while self._next < min(stop, len(self.order)):
            unit = self.order[self._next]
            self._next += 1
            if not unit.here:
                unit.gather()
                self._ahead.append(unit)
        for unit in self.order[self._next : self._next + 1]:
            unit.fetch()  # its slice comes from where it rests while those before it are gathered

    def _skip_before(self, place: int, wanted: Unit | None = None) -> None:
        """Put away what was gathered for places that this rank has passed."""
        for unit in [unit for unit in self._ahead if self._place[unit] < place and unit is not wanted]:
            self._ahead.remove(unit)
            if unit.plan.whole_pass or unit.repeated or self._stays(unit):
                unit.wait()
            else:
                self._put_away(unit)
