"""Why a run ends, as one rank decides it for all."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Literal

import attrs

from powertrain.errors import (
    CollectiveDiverged,
    CollectiveStalled,
    CommunicationError,
    PeerFailed,
    PowertrainError,
)
from powertrain.mesh import Mesh
from powertrain_comm.watchdog.diagnosis import Entry, State, find_behind, find_divergence, table

KINDS: Mapping[str, type[CommunicationError]] = {
    "stalled": CollectiveStalled,
    "diverged": CollectiveDiverged,
    "lost": PeerFailed,
    "raised": PeerFailed,
}


@attrs.frozen(kw_only=True)
class Verdict:
    """Why the run ends; travels between the ranks as JSON.

    Attributes:
        kind: which error it is.
        message: the error's first sentence.
        details: what is printed once: the table, or the failing rank's traceback.
        rank: the rank that raised (kind ``raised``).
        reporter: the rank that prints the details.
        absent: ranks from which nothing more will come.
    """

    kind: Literal["stalled", "diverged", "lost", "raised"]
    message: str
    details: str
    rank: int | None = None
    reporter: int = 0
    absent: tuple[int, ...] = ()

    def error(self) -> CommunicationError:
        """Return the exception that stands for it."""
        return KINDS[self.kind](self.message)

    def full(self) -> str:
        """Return all that there is to print."""
        if self.kind == "raised":
            return f"rank {self.rank} raised:\n{self.details}"
        return f"{self.error()}\n{self.details}"


def raised(rank: int, error: BaseException) -> Verdict:
    """Return the verdict that ``rank`` raised ``error``; only a surprise is told by its traceback."""
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted by Ctrl-C"
    elif isinstance(error, PowertrainError):
        text = str(error)  # it says the place and the remedy; a traceback would bury them
    else:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    summary = traceback.format_exception_only(type(error), error)[-1].strip().splitlines()[0]
    return Verdict(kind="raised", message=f"rank {rank} raised {summary}", details=text, rank=rank, reporter=rank)


def judge(
    mesh: Mesh, states: Mapping[int, State], *, stalled: Entry | None, rank: int, timeout: float
) -> Verdict | None:
    """Return why the run must end, or None if the states do not tell.

    Args:
        mesh: the ranks' arrangement.
        states: what is known of every rank.
        stalled: the collective that ran out of time; None if the connection broke instead.
        rank: who asks.
        timeout: the time that collectives have, in seconds.
    """
    absent = tuple(sorted(r for r, state in states.items() if not state.answered and not state.left))
    left = tuple(sorted(r for r, state in states.items() if state.left))
    divergence = find_divergence(mesh, states) or (
        find_divergence(mesh, states, labels=True) if stalled or left else None
    )
    lines = [*(divergence.lines() if divergence else ()), *find_behind(mesh, states)]
    lines += [f"no answer: rank {r}; it is dead, or stuck in native code" for r in absent]
    waiting = stalled or states[rank].waiting()
    what = f"#{waiting.number} along {waiting.dimension!r}, {waiting}" if waiting else "a collective"
    if divergence is not None:
        kind, message = (
            "diverged",
            f"ranks issued different collectives at #{divergence.number} along {divergence.dimension!r}",
        )
    elif stalled is not None:
        kind, message = "stalled", f"{what} did not finish within {timeout:g} s on rank {rank}"
    elif absent:
        kind, message = "lost", f"rank {', '.join(map(str, absent))} died while rank {rank} was in {what}"
    elif left:
        kind, message = "lost", f"rank {', '.join(map(str, left))} left the run while rank {rank} was in {what}"
    else:
        return None
    reporter = min((r for r, state in states.items() if state.answered), default=rank)
    details = "\n".join([table(states[r] for r in sorted(states)), *lines])
    return Verdict(kind=kind, message=message, details=details, reporter=reporter, absent=absent + left)  # type: ignore[arg-type]
