"""Measures, once per host, which algorithm is faster, and gives every group its table.

That happens where groups are made: all ranks of the world are there, and
nothing that is under way waits for one of them. At the first large message it
would be too late to be safe. ``issue`` waits for nobody, so a rank may issue
a collective and only then send what another one must receive before it issues
the same: if the first one stopped to measure, both would wait for ever.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from powertrain.roles.communicator import Collective, Handle, Operation
from powertrain_comm import tables
from powertrain_comm.algorithms import (
    CLASSES,
    RULE,
    Algorithm,
    Setting,
    Table,
    Times,
    possible,
    times_from_json,
    times_to_json,
)
from powertrain_comm.council import Council
from powertrain_comm.operations import START, Group
from powertrain_comm.shm.peers import host_name

if TYPE_CHECKING:
    from powertrain.environment import Rank
    from powertrain_comm.pairwise import Pairwise

BUDGET = 0.8
"""Seconds for all tables that are measured at one time."""

TURNS = 4
"""How often each pair is compared, as far as the budget goes; the shortest time counts."""

CLEAR = 2.0
"""A pair that is so many times apart after two turns is compared no more."""

ALGORITHMS: tuple[Algorithm, ...] = ("gloo", "pairwise")


class Chooser:
    """Gives groups their tables; its method is called by all ranks of the world together.

    Args:
        setting: what ``[comm] algorithms`` says.
        rank: this process's place in the launch.
        world: the group of all ranks.
        pairwise: carries out direct exchanges.
    """

    def __init__(self, setting: Setting, rank: Rank, world: Group, pairwise: Pairwise) -> None:
        self._setting = setting
        self._host = hashlib.sha256(host_name(rank).encode()).digest()
        self._council = Council(world)
        self._pairwise = pairwise

    def choose(self, groups: Sequence[Group]) -> None:
        """Give each of ``groups``, which stand for one dimension each, its table.

        The groups of other ranks along the same dimension get the same one, for what tensor-parallel ranks hold in
        common must stay equal bit by bit. Rank 0's times count, on its host and elsewhere.

        Raises:
            RuntimeError: a rank is gone.
        """
        groups = list({id(group): group for group in groups if group.pairwise}.values())
        if not groups:
            return
        if self._setting != "measured":
            for group in groups:
                group.table = Table.pinned(self._setting)
            return
        known, keys = self._known(groups)
        missing: dict[str, Group] = {}
        for group, key in zip(groups, keys, strict=True):
            if key not in known:
                missing.setdefault(key, group)
        for key, group in missing.items():
            known[key] = _Contest(group, self._pairwise).run(self._council, BUDGET / len(missing))
            if self._council.leads:
                tables.save(tables.facts(*map(int, key.split())), known[key])
        for group, key in zip(groups, keys, strict=True):
            group.table = Table.from_times(known[key])

    def _known(self, groups: Sequence[Group]) -> tuple[dict[str, Times], list[str]]:
        """Return the times that rank 0 has, by key, and each group's key: its ranks, and how many hosts they are on."""
        homes = self._council.gather(self._host)
        found: dict[str, Any] = {}
        keys = []
        if self._council.leads:
            keys = [f"{len(group.ranks)} {len({homes[rank] for rank in group.ranks})}" for group in groups]
            for key in keys:
                times = tables.load(tables.facts(*map(int, key.split())))
                if times is not None:
                    found[key] = times_to_json(times)
        keys, found = self._council.tell([keys, found])
        return {key: times_from_json(value) or {} for key, value in found.items()}, keys


class _Contest:
    """Times both algorithms in one group, while the other groups of its dimension do the same.

    Args:
        group: this rank's.
        pairwise: carries out direct exchanges.
    """

    def __init__(self, group: Group, pairwise: Pairwise) -> None:
        self._group = group
        count = len(group.ranks)
        # Zeros stay zeros however often they are summed. They are written, so that no time is a page fault's.
        self._whole = torch.empty(CLASSES[-1] // 4 // count * count).zero_()
        self._piece = torch.empty(self._whole.numel() // count).zero_()
        self._start: dict[Algorithm, Callable[[Collective], Handle]] = {
            "gloo": lambda collective: START[collective.operation](collective, group),
            "pairwise": lambda collective: pairwise.start(collective, group),
        }

    def run(self, council: Council, budget: float) -> Times:
        """Return what was measured in ``budget`` seconds: small sizes first, and large ones as long as they fit in.

        What is run next depends on numbers that all ranks have agreed on, so all run the same.
        """
        count = len(self._group.ranks)
        times: Times = {operation: {} for operation in RULE}
        council.slowest([0.0])  # ranks that come late would count as slow
        began, spent = time.perf_counter(), 0.0
        for turn in range(TURNS):
            for place, least in enumerate(CLASSES):
                for operation in RULE:
                    best = times[operation].get(least, {})
                    smaller = times[operation].get(CLASSES[place - 1], {}) if place else {}
                    if not possible(operation, least, count) or (turn > 1 and _is_clear(best)):
                        continue
                    expected = sum(best.values()) or sum(smaller.values()) * CLASSES[1] / CLASSES[0]
                    if spent + expected > budget or (place and not expected):
                        continue
                    for algorithm in ALGORITHMS:
                        seconds = self._time(algorithm, operation, least)
                        seconds, spent = council.slowest([seconds, time.perf_counter() - began])
                        best[algorithm] = min(seconds, best.get(algorithm, seconds))
                    times[operation][least] = best
        return times

    def _time(self, algorithm: Algorithm, operation: Operation, nbytes: int) -> float:
        """Return the seconds that one collective took here."""
        count = len(self._group.ranks)
        piece = self._piece[: nbytes // self._piece.element_size() // count]
        whole = self._whole[: piece.numel() * count]
        collective = Collective(
            operation=operation,
            dimension="",
            input=piece if operation == "all_gather" else whole,
            output=piece if operation == "reduce_scatter" else whole,
        )
        began = time.perf_counter()
        self._start[algorithm](collective).wait()
        return time.perf_counter() - began


def _is_clear(times: dict[str, float]) -> bool:
    return bool(times) and max(times.values()) > CLEAR * min(times.values())
