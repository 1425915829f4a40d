"""From what every rank remembers to who diverged; pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from powertrain.mesh import Mesh

POINT_TO_POINT = ("send", "receive")


@attrs.frozen(kw_only=True)
class Entry:
    """One collective as a rank told the others of it; see ``Record.facts``."""

    number: int
    operation: str
    dimension: str
    peer: int | None
    shape: tuple[int, ...]
    dtype: str
    reduction: str
    label: str
    site: str
    age: float
    waiting: bool

    @property
    def signature(self) -> tuple[object, ...]:
        """What must be equal on all ranks for the collective to work; uneven exchanges differ in length."""
        numel = 1
        for size in self.shape:
            numel *= size
        length = -1 if self.operation == "all_to_all" else numel
        root = self.peer if self.operation == "broadcast" else None
        return (self.operation, length, self.dtype, self.reduction, root)

    def __str__(self) -> str:
        reduced = f" {self.reduction}" if self.reduction else ""
        label = f" of {self.label!r}" if self.label else ""
        dtype = f" {self.dtype}{list(self.shape)}" if self.dtype else ""
        return f"{self.operation}{reduced}{label}{dtype} at {self.site}"


@attrs.frozen(kw_only=True)
class State:
    """What one rank told the others.

    Attributes:
        rank: whose it is.
        entries: its last collectives and all that are under way.
        counts: how many it issued along each dimension.
        now: where its main thread is.
        answered: whether it was told on request; otherwise it is the last that was heard.
        left: whether it has closed the communicator, or its process is exiting.
    """

    rank: int
    entries: tuple[Entry, ...] = ()
    counts: Mapping[str, int] = attrs.field(factory=dict)
    now: str = "?"
    answered: bool = False
    left: bool = False

    @classmethod
    def parse(cls, rank: int, facts: Mapping[str, Any] | None, *, answered: bool, left: bool) -> State:
        """Make a state of what ``Ledger.state`` gave, or of nothing."""
        facts = facts or {"records": (), "counts": {}, "now": "?"}
        entries = tuple(Entry(**{**record, "shape": tuple(record["shape"])}) for record in facts["records"])
        return cls(rank=rank, entries=entries, counts=facts["counts"], now=facts["now"], answered=answered, left=left)

    def waiting(self) -> Entry | None:
        """Return the oldest collective under way."""
        under_way = [entry for entry in self.entries if entry.waiting]
        return max(under_way, key=lambda entry: entry.age, default=None)

    def at(self, dimension: str, number: int) -> Entry | None:
        """Return the collective of this number along ``dimension``, if it is remembered."""
        return next((e for e in self.entries if (e.dimension, e.number) == (dimension, number) and _is_joint(e)), None)

    def last(self, dimension: str) -> Entry | None:
        """Return the latest collective along ``dimension``."""
        joint = [entry for entry in self.entries if entry.dimension == dimension and _is_joint(entry)]
        return max(joint, key=lambda entry: entry.number, default=None)


def _is_joint(entry: Entry) -> bool:
    return entry.operation not in POINT_TO_POINT


@attrs.frozen
class Divergence:
    """The first place where ranks of one group did different things.

    Attributes:
        dimension: along which.
        number: the place in the group's sequence.
        entries: what each rank did there.
        ranks: those that differ from most of the others; all, where there is no majority.
    """

    dimension: str
    number: int
    entries: Mapping[int, Entry]
    ranks: tuple[int, ...]

    def lines(self) -> list[str]:
        """Return it for people: who, and what each one did."""
        told = [f"diverged: {_names(self.ranks)}, at #{self.number} along {self.dimension!r}:"]
        return told + [f"  rank {rank} issued {entry}" for rank, entry in sorted(self.entries.items())]


def find_divergence(mesh: Mesh, states: Mapping[int, State], *, labels: bool = False) -> Divergence | None:
    """Return the earliest collective on which ranks of one group disagree.

    Args:
        mesh: the ranks' arrangement.
        states: what is known of each rank.
        labels: also take different labels for a disagreement.
    """
    dimensions = sorted({entry.dimension for state in states.values() for entry in state.entries})
    for dimension in dimensions:
        for group in mesh.groups(dimension):
            known = {rank: _by_number(states[rank], dimension) for rank in group if rank in states}
            for number in sorted(set().union(*known.values())):
                entries = {rank: by_number[number] for rank, by_number in known.items() if number in by_number}
                kinds = {rank: (e.signature, e.label if labels else "") for rank, e in entries.items()}
                if len(set(kinds.values())) > 1:
                    return Divergence(dimension, number, entries, _minority(kinds))
    return None


def _by_number(state: State, dimension: str) -> dict[int, Entry]:
    return {entry.number: entry for entry in state.entries if entry.dimension == dimension and _is_joint(entry)}


def _minority(kinds: Mapping[int, object]) -> tuple[int, ...]:
    (usual, count), *others = Counter(kinds.values()).most_common()
    if others and others[0][1] == count:
        return tuple(sorted(kinds))
    return tuple(sorted(rank for rank, kind in kinds.items() if kind != usual))


def find_behind(mesh: Mesh, states: Mapping[int, State]) -> list[str]:
    """Return a line for each rank that has not issued what another one waits for."""
    lines: dict[tuple[int, str], str] = {}
    for state in states.values():
        entry = state.waiting()
        if entry is None:
            continue
        peers = attrs.evolve(mesh, rank=state.rank).peers(entry.dimension)
        if not _is_joint(entry):
            other = peers[entry.peer or 0]
            verb = "received" if entry.operation == "send" else "sent"
            lines.setdefault(
                (other, entry.operation), f"behind: rank {other} has not {verb} what rank {state.rank} waits for"
            )
            continue
        for rank in peers:
            if rank in states and states[rank].counts.get(entry.dimension, 0) < entry.number:
                last = states[rank].last(entry.dimension)
                did = f"its last one there is #{last.number} {last}" if last else "it issued none there"
                at = "it has left" if states[rank].left else f"it is at {states[rank].now}"
                line = (
                    f"behind: rank {rank} has not issued #{entry.number} along {entry.dimension!r}, "
                    f"{entry}, for which rank {state.rank} waits; {did}; {at}"
                )
                lines.setdefault((rank, entry.dimension), line)
    return [lines[key] for key in sorted(lines)]


HEADINGS = ("rank", "state", "for", "#", "operation", "dimension", "shape", "dtype", "label", "issued at", "now at")


def table(states: Iterable[State]) -> str:
    """Return one row per rank: what it waits for, or did last."""
    rows = [HEADINGS, *(_row(state) for state in states)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(state: State) -> Sequence[str]:
    waiting = state.waiting()
    entry = waiting or (state.entries[-1] if state.entries else None)
    doing = "left" if state.left else "waiting" if waiting else "idle"
    if not state.answered and not state.left:
        doing = "no answer"
    if entry is None:
        return (str(state.rank), doing, *[""] * 8, state.now)
    return (
        str(state.rank), doing, f"{entry.age:.1f} s", str(entry.number), entry.operation, entry.dimension,
        str(list(entry.shape)), entry.dtype, entry.label, entry.site, state.now,
    )  # fmt: skip


def _names(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
