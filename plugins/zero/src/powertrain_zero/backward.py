"""Which units a backward pass gathers and reduces, in an order written down before it begins.

A rank works through that order as autograd comes to its units; what it does not
come to, it gathers and reduces all the same. Nothing that is collective depends
on what only this rank knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from powertrain.compat import after_backward
from powertrain_zero.passes import Rounds, join
from powertrain_zero.timeline import Cursor, Step, backward_steps
from powertrain_zero.unit import Unit


class Backward:
    """Gathers, reduces and frees units while autograd runs.

    Args:
        units: all units, in the order of registration.
        prefetch: how many are gathered ahead.
        rounds: gathers what the order does not foresee.
        reducing: asked when backward begins: are gradients reduced in it?
        reduced: told when backward is over.
        in_use: whether a forward pass that is still open needs a unit.

    Attributes:
        history: the units of each forward pass that will be gone back through.
        ran: the units that this rank ran in them.
        lasting: gradients are differentiated as well, so what was gathered stays until ``forget``.
        delayed: units that were sent before their gradients came, on any rank, in a step before.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        prefetch: int,
        rounds: Rounds,
        reducing: Callable[[], bool],
        reduced: Callable[[], None],
        in_use: Callable[[Unit], bool],
    ) -> None:
        self.history: list[list[Unit]] = []
        self.ran: set[Unit] = set()
        self.lasting = False
        self.delayed: set[Unit] = set()
        self._units = list(units)
        self._prefetch = prefetch
        self._rounds = rounds
        self._reducing = reducing
        self._reduced = reduced
        self._in_use = in_use
        self._before: tuple[list[list[Unit]], set[Unit]] = ([], set())
        self._cursor: Cursor[Unit] | None = None
        self._skipped: list[Unit] = []
        self._ran: set[Unit] = set()

    def arrive(self, unit: Unit) -> None:
        """Bring a unit here whose backward is next, and start what is due."""
        self.begin()
        assert self._cursor is not None
        for step in self._cursor.through(unit):
            self._run(step)
        if unit in self._skipped:
            self._pass_over(self._skipped.index(unit))
            self._skipped.remove(unit)
        if not unit.here:
            self._rounds.bring(unit)
        unit.wait()

    def begin(self) -> None:
        """Write the order down, if this is the first that is heard of a backward pass."""
        if self._cursor is not None:
            return
        if self.history:
            self._before = (self.history, self.ran)
            self.history, self.ran = [], set()
        # A graph that is gone back through again: by the same order again.
        passes, self._ran = self._before
        whole = [unit for unit in self._units if unit.plan.whole_pass]
        reducing = {unit for unit in self._units if unit.gradients} if self._reducing() else set()
        # What is here now is so on all ranks: passes end alike everywhere.
        here = {unit for unit in self._units if unit.here}
        steps, marks = backward_steps(
            passes, whole, prefetch=self._prefetch, reducing=reducing, here=here, delayed=self.delayed
        )
        for unit in self._units:
            unit.done = False
        visits = [unit for units in reversed(passes) for unit in reversed(units)]
        self._skipped = [unit for unit in dict.fromkeys(visits) if unit in here and not unit.plan.whole_pass]
        self._cursor = Cursor(steps, marks)
        after_backward(self._end)

    def completed(self) -> None:
        """Reduce what is complete, as far as the order allows."""
        if self._cursor is None:
            return
        while (step := self._cursor.peek()) is not None and step.kind == "reduce" and step.unit.complete:
            self._run(self._cursor.advance())

    def close(self, unit: Unit) -> None:
        """End one call of a unit; after the last, all its gradients are there."""
        unit.open_calls -= 1
        if unit.open_calls <= 0:
            unit.done = True
            self.completed()
        wanted = unit in self._skipped  # gathered for another visit already
        if (unit.open_calls <= 0 or not unit.repeated) and not wanted:
            self._free(unit)

    def abandon(self) -> None:
        """Work through what is left of a backward pass that failed: other ranks may have come further."""
        if self._cursor is not None:
            self._finish()

    def forget(self) -> None:
        """Drop what is known of passes whose backward has not come."""
        self.history, self.ran = [], set()
        self._before = ([], set())
        self.lasting = False

    def _run(self, step: Step[Unit]) -> None:
        if step.kind == "reduce":
            step.unit.send()
            return
        join(step.unit)
        coming = self._cursor.coming() if self._cursor is not None else None
        if coming is not None:
            coming.fetch()  # its slice comes from where it rests while this one is gathered and used
        if not step.unit.plan.whole_pass:
            self._skipped.append(step.unit)

    def _pass_over(self, place: int) -> None:
        """Free what was gathered before a unit that backward has come to, unless this rank will need it yet."""
        for unit in [unit for unit in self._skipped[:place] if unit not in self._ran]:
            self._skipped.remove(unit)
            self._free(unit)

    def _end(self) -> None:
        if self._cursor is None:
            return
        self._finish()
        self._reduced()

    def _finish(self) -> None:
        assert self._cursor is not None
        for step in self._cursor.rest():
            self._run(step)
            if step.kind == "gather" and not step.unit.plan.whole_pass:
                self._free(step.unit)
        self._cursor = None
        self._skipped.clear()
        for unit in self._units:
            unit.open_calls = 0
            self._free(unit)

    def _free(self, unit: Unit) -> None:
        if unit.here and not self._in_use(unit) and not self.lasting:
            unit.release()
