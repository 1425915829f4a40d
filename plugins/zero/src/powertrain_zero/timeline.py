"""One fixed order of collectives in backward, the same on every rank.

Gathers and reductions interleave. What starts when depends on autograd, which
may differ between ranks that took different branches; the order may not. So the
order is written down before backward begins, and each rank works through it: a
reduction that is complete starts when all before it have started; a gather that
is needed now forces all before it out, with what they have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Generic, Literal, TypeVar

import attrs

U = TypeVar("U")


@attrs.frozen
class Step(Generic[U]):
    """One entry: gather a unit, or reduce its gradients."""

    kind: Literal["gather", "reduce"]
    unit: U


def backward_steps(
    passes: Sequence[Sequence[U]],
    last: Sequence[U],
    *,
    prefetch: int,
    reducing: Collection[U],
    here: Collection[U] | None = None,
    delayed: Collection[U] = (),
) -> tuple[list[Step[U]], list[tuple[U, int]]]:
    """Write down a backward pass.

    Args:
        passes: the units of each forward pass that will be gone back through, in order of first use.
        last: units that are gathered throughout; reduced at the end.
        prefetch: how many units are gathered ahead.
        reducing: the units whose gradients are reduced in this backward pass.
        here: units that need no gather on their first visit, and of ``last`` no gather at all; the
            others of ``last`` are gathered first. None: nothing is said of ``last``, and no other is here.
        delayed: units whose gradients come only when backward has come to a unit behind them, as where
            activation checkpointing runs several units again at once: reduced after the next that is none of these.

    Returns:
        The steps; and for each unit in order of backward, the number of steps that
        must have started when backward comes to it, its own gather and those ahead included.
    """
    late = list(dict.fromkeys(last))
    backward = [unit for units in reversed(passes) for unit in reversed(units) if unit not in late]
    final = {unit: place for place, unit in enumerate(backward)}
    steps: list[Step[U]] = []
    marks: list[tuple[U, int]] = []
    if here is not None:
        ran = {unit for units in passes for unit in units}
        steps = [Step("gather", unit) for unit in late if unit in ran and unit not in here]
        marks = [(step.unit, len(steps)) for step in steps]
    present = set(here or ())
    held: list[U] = []
    gathered = 0
    for place, unit in enumerate(backward):
        while gathered < min(len(backward), place + 1 + prefetch):
            if backward[gathered] in present:
                present.remove(backward[gathered])
            else:
                steps.append(Step("gather", backward[gathered]))
            gathered += 1
        marks.append((unit, len(steps)))
        if unit in reducing and final[unit] == place:
            held.append(unit)
        if unit not in delayed:
            steps += [Step("reduce", done) for done in held]
            held.clear()
    steps += [Step("reduce", unit) for unit in [*held, *late] if unit in reducing]
    return steps, marks


class Cursor(Generic[U]):
    """A rank's place in a list of steps."""

    def __init__(self, steps: Sequence[Step[U]], marks: Sequence[tuple[U, int]] = ()) -> None:
        self._steps = list(steps)
        self._marks = list(marks)
        self._next = 0
        self._seen = 0

    def through(self, unit: U) -> Iterator[Step[U]]:
        """Yield the steps that are due when backward comes to ``unit``."""
        for place in range(self._seen, len(self._marks)):
            if self._marks[place][0] is unit:
                self._seen = place
                yield from self._until(self._marks[place][1])
                return

    def advance(self) -> Step[U]:
        """Return the next step, and go on."""
        self._next += 1
        return self._steps[self._next - 1]

    def peek(self) -> Step[U] | None:
        """Return the next step, or None at the end."""
        return self._steps[self._next] if self._next < len(self._steps) else None

    def coming(self) -> U | None:
        """Return the unit whose gather is the next to start; None when none is left."""
        return next((step.unit for step in self._steps[self._next :] if step.kind == "gather"), None)

    def rest(self) -> Iterator[Step[U]]:
        """Yield all steps that have not started."""
        yield from self._until(len(self._steps))

    def _until(self, stop: int) -> Iterator[Step[U]]:
        while self._next < stop:
            yield self.advance()
