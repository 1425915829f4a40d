"""The sampler role: which samples this rank sees, and in which order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from powertrain.errors import DataError

if TYPE_CHECKING:
    from powertrain.config.batch import BatchSizes


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


class EpochPosition(Sampler):
    """A sampler that deals an epoch's order of the dataset out in global batches, one contiguous slice a rank.

    A subclass gives the order. Global batch k is positions ``k * total`` to ``(k + 1) * total`` of it, whatever the
    number of ranks, and rank r takes the r-th slice of these. What is left at an epoch's end and fills no global
    batch is left out of that epoch. The position is the number of samples taken, so it means the same on another
    number of ranks and for other batch sizes.

    Args:
        length: samples in the dataset.
        sizes: the batch sizes of the run.
        data_rank: this rank's index along the data dimension.
        data_size: ranks along the data dimension.
        seed: chooses the order.

    Attributes:
        kind: names the rule of the order in saved positions.
        local: samples in a local batch.
        first: where this rank's slice begins in a global batch.
        epoch: epochs gone through.
        consumed: samples of the present epoch that all ranks together have taken.

    Raises:
        DataError: the dataset is shorter than one global batch.
    """

    kind: str

    def __init__(self, length: int, sizes: BatchSizes, data_rank: int, data_size: int, seed: int) -> None:
        if length < sizes.total:
            ranks = f"{data_size} data rank{'s' if data_size > 1 else ''}"
            raise DataError(
                f"the dataset has {length} samples, fewer than one global batch",
                expected=f"at least {sizes.total} = micro {sizes.micro} x accumulation {sizes.accumulation} x {ranks}",
                remedy="lower `[batch] total` or `micro`, start fewer ranks, or use more data",
            )
        self.length, self.sizes, self.seed = length, sizes, seed
        self.local = sizes.total // data_size
        self.first = data_rank * self.local
        self.epoch = 0
        self.consumed = 0

    def __len__(self) -> int:
        return self.length // self.sizes.total

    def starts(self) -> range:
        """Return where this rank's remaining local batches begin in the epoch's order."""
        total = self.sizes.total
        return range(self.consumed + self.first, self.length - total + self.first + 1, total)

    def advance(self) -> None:
        """Count one global batch as taken."""
        self.consumed += self.sizes.total
        self._roll_over()

    def order(self) -> dict[str, Any]:
        """Return as JSON what the order of an epoch depends on."""
        return {"length": self.length, "seed": self.seed}

    def remedy(self, key: str, saved: Any) -> str:
        """Return what to do where ``key`` of the order, or the kind of sampler, was ``saved`` and is not now."""
        if key == "kind":
            return "train with the sampler that the checkpoint was made with"
        if key == "length":
            return "use the dataset of the checkpoint"
        return f"set `[run] {key} = {saved}` to continue the order of the checkpoint"

    def state(self) -> dict[str, Any]:
        """Return epoch and samples taken in it, and what the order depends on."""
        return {"kind": self.kind, "epoch": self.epoch, "consumed": self.consumed, **self.order()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, on any number of ranks and with any batch sizes.

        Samples that fill no global batch of this run are left out, as at any epoch's end.

        Raises:
            DataError: the state is of another dataset, order or kind of sampler.
        """
        for key, own in {"kind": self.kind, **self.order()}.items():
            saved = state.get(key)
            if saved != own:
                why = "another sampler wrote it" if key == "kind" else f"its {key} differs"
                raise DataError(
                    f"the saved position belongs to another order of samples: {why}",
                    expected=f"{key} = {saved}",
                    found=f"{key} = {own}",
                    remedy=self.remedy(key, saved),
                )
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self._roll_over()

    def _roll_over(self) -> None:
        """Begin the next epoch when what is left of this one fills no global batch."""
        if self.consumed + self.sizes.total > self.length:
            self.epoch, self.consumed = self.epoch + 1, 0
