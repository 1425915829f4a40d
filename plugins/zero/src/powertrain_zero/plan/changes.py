"""The changes of a configuration that would make it fit, the cheapest first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs

from powertrain_zero.plan.estimate import Need


@attrs.frozen(kw_only=True)
class Choice:
    """What a change can change.

    Attributes:
        stage: 0 to 3.
        ranks: data ranks.
        micro: samples of a micro-batch.
        accumulation: micro-batches of a step.
        compute: ``fp32``, ``bf16`` or ``fp16``.
    """

    stage: Literal[0, 1, 2, 3]
    ranks: int
    micro: int
    accumulation: int
    compute: str


@attrs.frozen
class Change:
    """A choice that fits.

    Attributes:
        steps: what to change, each in words.
        need: what it needs then.
    """

    steps: tuple[str, ...]
    need: Need


@attrs.frozen
class Step:
    """One thing to change.

    Attributes:
        values: of a ``Choice``.
        words: what to write, or to start.
    """

    values: Mapping[str, Any]
    words: str


MOST_RANKS = 4096
"""More are not proposed."""


def fitting(now: Choice, fits: Callable[[Choice], Need | None], count: int = 4) -> list[Change]:
    """Return changes that fit: as few at once as can be, and of each as little as can be; the cheapest first.

    Args:
        now: what does not fit.
        fits: returns the need of a choice that fits, else None.
        count: how many are enough; with two, more changes at once are not looked at.
    """
    lines = [list(line(now)) for line in (_stages, _micro, _compute, _ranks)]
    lines = [line for line in lines if line]
    found: list[Change] = []
    used: list[set[int]] = []
    for together in range(1, len(lines) + 1):
        for chosen in itertools.combinations(range(len(lines)), together):
            if len(found) >= count or any(others <= set(chosen) for others in used):
                continue  # less would do
            change = _least([lines[place] for place in chosen], now, fits)
            if change is not None:
                found.append(change)
                used.append(set(chosen))
        if len(found) > 1:
            break
    return found


def _least(lines: Sequence[Sequence[Step]], now: Choice, fits: Callable[[Choice], Need | None]) -> Change | None:
    """Return the least change along several lines that fits."""

    def apply(steps: Sequence[Step]) -> Need | None:
        return fits(attrs.evolve(now, **{key: value for step in steps for key, value in step.values.items()}))

    if apply([line[-1] for line in lines]) is None:
        return None  # each goes towards less
    places = sorted(itertools.product(*(range(len(line)) for line in lines)), key=sum)
    for place in places:
        steps = [line[number] for line, number in zip(lines, place, strict=True)]
        if (need := apply(steps)) is not None:
            return Change(tuple(step.words for step in steps), need)
    return None


def _stages(now: Choice) -> Iterator[Step]:
    for stage in range(now.stage + 1, 4):
        yield Step({"stage": stage}, f"[zero] stage = {stage}")


def _micro(now: Choice) -> Iterator[Step]:
    micro = now.micro
    while micro > 1:
        # The same number of samples make a step.
        micro = next(size for size in range(micro // 2, 0, -1) if now.micro % size == 0)
        accumulation = now.accumulation * (now.micro // micro)
        words = f"[batch] micro = {micro}, accumulation = {accumulation}"
        yield Step({"micro": micro, "accumulation": accumulation}, words)


def _compute(now: Choice) -> Iterator[Step]:
    if now.compute == "fp32":
        yield Step({"compute": "bf16"}, '[precision] compute = "bf16"')


def _ranks(now: Choice) -> Iterator[Step]:
    ranks = now.ranks * 2
    while ranks <= MOST_RANKS:
        yield Step({"ranks": ranks}, f"{ranks} ranks")
        ranks *= 2
