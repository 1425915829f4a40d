"""The sampler of the plugin ``data``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from powertrain.errors import DataError
from powertrain.roles.sampler import Sampler
from powertrain_data.permutation import Permutation

if TYPE_CHECKING:
    from powertrain.config.batch import BatchSizes

_AHEAD = 1024
"""Samples whose places are computed together: one costs nearly as much as a thousand."""


def length_of(dataset: Any) -> int:
    """Return the number of samples of a map-style dataset.

    Raises:
        DataError: it has no length.
    """
    try:
        return len(dataset)
    except TypeError:
        raise DataError(
            f"a {type(dataset).__name__} has no length, so its samples cannot be dealt out to ranks",
            expected="a dataset with __len__ and __getitem__",
            remedy="give a map-style dataset, or pass batches to `engine.train_step` yourself",
        ) from None


class ShuffledSampler(Sampler):
    """Deals an epoch's order of the dataset out in global batches, one contiguous slice a rank.

    The order depends on the seed and the epoch alone. With ``total`` samples in
    a global batch and ``local`` of them on each rank, rank r takes positions
    ``r * local`` to ``(r + 1) * local`` of the next ``total``. What is left at
    an epoch's end and fills no global batch is left out of that epoch. The
    position is the number of samples taken, so it means the same on another
    number of ranks and for other batch sizes.

    Args:
        length: samples in the dataset.
        sizes: the batch sizes of the run.
        data_rank: this rank's index along the data dimension.
        data_size: ranks along the data dimension.
        seed: chooses the order.
        shuffle: False keeps the dataset's own order.

    Raises:
        DataError: the dataset is shorter than one global batch.
    """

    kind = "shuffled"

    def __init__(
        self, length: int, sizes: BatchSizes, *, data_rank: int, data_size: int, seed: int, shuffle: bool = True
    ) -> None:
        if length < sizes.total:
            raise DataError(
                f"the dataset has {length} samples, fewer than one global batch",
                expected=f"at least {sizes.total} = micro {sizes.micro} x accumulation {sizes.accumulation} "
                f"x {data_size} data rank{'s' if data_size > 1 else ''}",
                remedy="lower `[batch] total` or `micro`, start fewer ranks, or use more data",
            )
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.total = sizes.total
        self.local = sizes.micro * sizes.accumulation
        self.first = data_rank * self.local
        self.epoch = 0
        self.consumed = 0

    def __len__(self) -> int:
        return self.length // self.total

    def __iter__(self) -> Iterator[list[int]]:
        order = Permutation(self.length, self.seed, self.epoch) if self.shuffle else None
        starts = range(self.consumed + self.first, self.length - self.total + self.first + 1, self.total)
        together = max(1, _AHEAD // self.local)
        for batch in range(0, len(starts), together):
            positions = np.array(starts[batch : batch + together])[:, None] + np.arange(self.local)
            yield from (positions if order is None else order(positions)).tolist()

    def advance(self) -> None:
        """Count one global batch as taken."""
        self.consumed += self.total
        self._roll_over()

    def state(self) -> dict[str, Any]:
        """Return the epoch, the samples taken in it, and what the order depends on."""
        return {
            "kind": self.kind,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "length": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, on any number of ranks and with any batch sizes.

        Samples that fill no global batch of this run are left out, as at any epoch's end.

        Raises:
            DataError: the state is of another dataset, order or sampler.
        """
        if state.get("kind") != self.kind:
            raise DataError(
                "the saved position belongs to another order: another sampler wrote it",
                expected=f"kind = {state.get('kind')}",
                found=f"kind = {self.kind}",
                remedy="train with the sampler the checkpoint was made with: add or remove the section [data]",
            )
        for key, words in (
            ("length", "the saved position belongs to another dataset: the number of samples differs"),
            ("seed", "the saved position belongs to another order: the seed differs"),
            ("shuffle", "the saved position belongs to another order: shuffling differs"),
        ):
            if state[key] != getattr(self, key):
                raise DataError(
                    words,
                    expected=f"{key} = {state[key]}",
                    found=f"{key} = {getattr(self, key)}",
                    remedy="use the dataset of the checkpoint"
                    if key == "length"
                    else f"set `[data] {key} = {str(state[key]).lower()}` to continue the order of the checkpoint",
                )
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self._roll_over()

    def _roll_over(self) -> None:
        """Begin the next epoch when what is left of this one fills no global batch."""
        if self.consumed + self.total > self.length:
            self.epoch, self.consumed = self.epoch + 1, 0
