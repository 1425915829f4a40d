"""The sampler role: which samples this rank sees, and in which order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any


class Sampler(ABC):
    """Chooses this rank's samples, one local batch at a time.

    The position counts batches that training has really taken (``advance``),
    not those read ahead. It is the same on every rank and does not depend on
    the number of ranks, so a run resumes at the exact sample on another world
    size.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of successive local batches, from the position to the epoch's end."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""

    @abstractmethod
    def advance(self) -> None:
        """Count one batch as taken; past the last one, the next epoch begins."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the position as JSON, the same on every rank."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a position that ``state`` returned, on this world size.

        Raises:
            DataError: the position belongs to another dataset or cannot be reached.
        """
