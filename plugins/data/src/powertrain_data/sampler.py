"""The sampler of the plugin ``data``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from powertrain.errors import DataError
from powertrain.roles.sampler import EpochPosition
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


class ShuffledSampler(EpochPosition):
    """Deals the dataset out in an order that is computed place by place, and never held in memory.

    The order depends on the seed and the epoch alone.

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
        super().__init__(length, sizes, data_rank, data_size, seed)
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[list[int]]:
        order = Permutation(self.length, self.seed, self.epoch) if self.shuffle else None
        starts = self.starts()
        together = max(1, _AHEAD // self.local)
        for batch in range(0, len(starts), together):
            positions = np.array(starts[batch : batch + together])[:, None] + np.arange(self.local)
            yield from (positions if order is None else order(positions)).tolist()

    def order(self) -> dict[str, Any]:
        """Return what the order depends on: shuffling as well."""
        return {**super().order(), "shuffle": self.shuffle}

    def remedy(self, key: str, saved: Any) -> str:
        """Return what to do: seed and shuffling are keys of ``[data]``."""
        if key == "kind":
            return "train with the sampler the checkpoint was made with: add or remove the section [data]"
        if key == "length":
            return super().remedy(key, saved)
        return f"set `[data] {key} = {str(saved).lower()}` to continue the order of the checkpoint"
