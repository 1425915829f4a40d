"""The order of backward's collectives, as a pure function."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from powertrain_zero.timeline import Cursor, Step, backward_steps

units = st.lists(st.integers(0, 9), max_size=8, unique=True)
passes = st.lists(units, min_size=1, max_size=3)


def test_a_plain_backward() -> None:
    """One unit ahead is gathered before a unit is reduced; the root comes last."""
    steps, marks = backward_steps([["root", "a", "b", "c"]], ["root"], prefetch=1, reducing=["root", "a", "b", "c"])
    shown = [f"{step.kind[0]}{step.unit}" for step in steps]
    assert shown == ["gc", "gb", "rc", "ga", "rb", "ra", "rroot"]
    assert marks == [("c", 2), ("b", 4), ("a", 5)]


def test_units_that_are_run_again_together() -> None:
    """What is sent too early otherwise is reduced behind the unit by which backward enters its segment."""
    steps, _ = backward_steps(["abcd"], [], prefetch=0, reducing="abcd", delayed="db")
    assert [f"{step.kind[0]}{step.unit}" for step in steps] == ["gd", "gc", "rd", "rc", "gb", "ga", "rb", "ra"]
    steps, _ = backward_steps(["abcd"], [], prefetch=0, reducing="abcd", delayed="abcd")
    assert [f"{step.kind[0]}{step.unit}" for step in steps] == ["gd", "gc", "gb", "ga", "rd", "rc", "rb", "ra"]


numbers = st.sets(st.integers(0, 9))


@given(passes, st.integers(0, 4), numbers, st.lists(st.integers(0, 9), max_size=2, unique=True), numbers)
def test_every_unit_is_gathered_and_reduced_as_often_as_it_must(
    passes: list[list[int]], prefetch: int, reducing: set[int], last: list[int], delayed: set[int]
) -> None:
    """A gather for each visit, in order; one reduction a unit, after its last visit's gather; at most so many ahead."""
    steps, marks = backward_steps(passes, last, prefetch=prefetch, reducing=reducing, delayed=delayed)
    visits = [unit for units in reversed(passes) for unit in reversed(units) if unit not in last]
    assert [step.unit for step in steps if step.kind == "gather"] == visits
    reduced = [step.unit for step in steps if step.kind == "reduce"]
    assert sorted(reduced) == sorted((set(visits) | set(last)) & reducing)
    for place, step in enumerate(steps):
        if step.kind == "reduce" and step.unit in visits:
            assert Step("gather", step.unit) not in steps[place:]
    assert [unit for unit, _ in marks] == visits
    for place, (_, stop) in enumerate(marks):
        gathered = sum(step.kind == "gather" for step in steps[:stop])
        assert min(len(visits), place + 1) <= gathered <= place + 1 + prefetch


@given(passes, st.integers(0, 3), st.data())
def test_ranks_that_come_to_different_units_run_the_same_steps(
    passes: list[list[int]], prefetch: int, data: st.DataObject
) -> None:
    """Whatever subset of the visits a rank makes, it works through the steps in their order, each once."""
    steps, marks = backward_steps(passes, [], prefetch=prefetch, reducing=range(10))
    cursor, run = Cursor(steps, marks), []
    for unit, _ in marks:
        if data.draw(st.booleans()):
            run += list(cursor.through(unit))
        while (step := cursor.peek()) is not None and step.kind == "reduce" and data.draw(st.booleans()):
            run.append(cursor.advance())
    run += list(cursor.rest())
    assert run == steps


def test_coming_to_a_unit_brings_its_gather() -> None:
    """After ``through``, the unit's own gather has been among the steps, however often it is asked."""
    steps, marks = backward_steps([[1, 2, 3]], [], prefetch=0, reducing=[])
    cursor: Cursor[int] = Cursor(steps, marks)
    assert list(cursor.through(3)) == [Step("gather", 3)]
    assert list(cursor.through(3)) == []
    assert list(cursor.through(1)) == [Step("gather", 2), Step("gather", 1)]
    assert list(cursor.through(7)) == []
    assert cursor.peek() is None
