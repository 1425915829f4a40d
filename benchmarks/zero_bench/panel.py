"""Contenders that live at the same time and take turns: what the machine does to one, it does to its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zero_bench.contenders import CONTENDERS
from zero_bench.launch import RANKS, Contestant, Failed, Run, Setting
from zero_bench.model import SIZES, parameters
from zero_bench.table import PEERS_OF


@dataclass(frozen=True)
class Plan:
    """How much each contender does.

    Attributes:
        rounds: turns of each.
        steps: of a turn.
        warmup: steps before the first turn.
        timeout: seconds after which a turn counts as failed.
        profile: whether a step of ours is profiled at the end.
    """

    rounds: int
    steps: int
    warmup: int
    timeout: float
    profile: bool


def panels(names: Sequence[str], alive: int) -> list[list[str]]:
    """Put contenders together that are to be compared, at most ``alive`` of them (and never less than two).

    Ours that share peers are together; when their peers are too many, ours run again with the rest.
    """
    families = [["powertrain-0"], ["powertrain-1", "powertrain-2"], ["powertrain-3"]]
    result: list[list[str]] = []
    if alive < 3:
        families = [[name] for family in families for name in family]
    for family in families:
        ours = [name for name in family if name in names]
        wanted = {peer for name in ours for peer in PEERS_OF[name]} | {"bound"}
        peers = [name for name in names if name in wanted]
        room = max(1, alive - len(ours))
        starts = range(0, len(peers) if ours else 0, room)
        result += [[*peers[start : start + room], *ours] for start in starts]
        if ours and not peers:
            result.append(ours)
    rest = [name for name in dict.fromkeys(names) if not any(name in panel for panel in result)]
    return result + [rest[start : start + alive] for start in range(0, len(rest), alive)]


def room_for(setting: Setting) -> int:
    """Return how many contenders of a setting this machine's free memory holds."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    each = RANKS * (17 * parameters(SIZES[setting.model]) + 450e6)
    return max(2, int(0.92 * free / each))


def compete(
    names: Sequence[str], setting: Setting, plan: Plan, first: int, say: Callable[[str], None]
) -> Iterator[list[Run]]:
    """Run one panel; yield the runs of each contender that fails, and at the end those of all others.

    Args:
        names: contenders that are alive together.
        setting: what they train.
        plan: how much.
        first: the number of the first round.
        say: shows progress.
    """
    alive: dict[str, Contestant] = {}
    turns: dict[str, list[Run]] = {}

    def attempt(name: str, action: Callable[[Contestant], None]) -> Iterator[list[Run]]:
        try:
            action(alive[name])
        except Failed as failure:
            say(f"    {name} FAILED: {failure}")
            runs = told(name)
            alive.pop(name).end()
            yield [*runs, Run(name, setting, first, error=str(failure))]

    def told(name: str, **more: object) -> list[Run]:
        losses = tuple(alive[name].losses)
        return [replace(run, losses=losses, **more) for run in turns.pop(name, [])]  # type: ignore[arg-type]

    def warm_up(contestant: Contestant) -> None:
        contestant.turn(plan.warmup, first)

    try:
        for name in names:
            say(f"    {name} starts")
            try:
                alive[name] = Contestant(name, setting, plan.timeout)
            except Failed as failure:
                say(f"    {name} FAILED: {failure}")
                yield [Run(name, setting, first, error=str(failure))]
                continue
            turns[name] = []
            if plan.warmup:
                yield from attempt(name, warm_up)
        for number in range(plan.rounds):
            order = list(alive)
            place = number % max(1, len(order))
            for name in [*order[place:], *order[:place]]:

                def go(contestant: Contestant, name: str = name, number: int = number) -> None:
                    turns[name].append(contestant.turn(plan.steps, first + number))

                yield from attempt(name, go)
            shown = ", ".join(f"{name} {turns[name][-1].step_seconds:.2f}" for name in alive)
            say(f"    round {number + 1} of {plan.rounds}, seconds a step: {shown}")
        for name in list(alive):
            profiled = plan.profile and CONTENDERS[name].ours

            def look(contestant: Contestant, name: str = name, profiled: bool = profiled) -> None:
                found = contestant.finish(profile=profiled)
                turns[name] = [replace(run, **found) for run in turns[name]]

            yield from attempt(name, look)
        for name in list(alive):
            yield told(name)
    except KeyboardInterrupt:
        for name in list(alive):
            yield told(name)
        raise
    finally:
        for contestant in alive.values():
            contestant.end()
