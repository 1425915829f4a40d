"""Agreement: when one rank fails, every rank raises, and none is left waiting for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from powertrain.errors import CheckpointError, PowertrainError

if TYPE_CHECKING:
    from powertrain.roles.communicator import Communicator

T = TypeVar("T")


def together(
    communicator: Communicator, label: str, work: Callable[[], T], share: Callable[[T], Any] = lambda _: None
) -> tuple[T, list[Any]]:
    """Run ``work`` on every rank; return its result and what all ranks share of theirs, or raise on all.

    Args:
        communicator: connects the ranks.
        label: what it is for, for people.
        work: what this rank does; it must use no collective.
        share: turns the result into JSON for the other ranks.

    Raises:
        CheckpointError: the work failed here or on another rank. A rank whose own
            work failed raises its own error; the others raise the same class,
            with the first failing rank's words.
    """
    try:
        result = work()
        verdict = {"share": share(result)}
    except Exception as error:
        failure = error
        if isinstance(error, OSError):
            failure = CheckpointError(f"the system refused: {error.strerror or error}", where=error.filename)
        communicator.gather_json(_describe(failure), label=label)
        raise failure from (None if failure is error else error)
    verdicts = communicator.gather_json(verdict, label=label)
    for rank, other in enumerate(verdicts):
        if "code" in other:
            raise _rebuild(rank, other)
    return result, [other["share"] for other in verdicts]


def _describe(error: Exception) -> dict[str, Any]:
    if isinstance(error, PowertrainError):
        fields = {name: getattr(error, name) for name in ("message", "where", "expected", "found", "remedy")}
        return {"code": error.code, **fields}
    return {"code": CheckpointError.code, "message": f"{type(error).__name__}: {error}"}


def _rebuild(rank: int, verdict: dict[str, Any]) -> CheckpointError:
    kinds = {kind.code: kind for kind in CheckpointError.__subclasses__()}
    kind = kinds.get(verdict.pop("code"), CheckpointError)
    message = f"rank {rank} failed: {verdict.pop('message')}"
    return kind(message, **verdict)
