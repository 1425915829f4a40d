"""The default sampler, and the loader that feeds an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from powertrain.roles.sampler import EpochPosition, Sampler


class EpochSampler(EpochPosition):
    """Shuffles the dataset anew each epoch; the order depends on the seed and the epoch alone."""

    kind = "epoch"

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.length, generator=generator)
        for start in self.starts():
            yield order[start : start + self.local].tolist()


class _Order(torch.utils.data.Sampler[list[int]]):
    """Shows a Sampler to torch's DataLoader as its batch sampler."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class Loader:
    """Yields this rank's local batches of one epoch, from wherever the sampler stands.

    A batch counts as taken when it is handed out, so a checkpoint saved after
    training on it resumes with the next one.
    """

    def __init__(self, dataset: Dataset[Any], sampler: Sampler, collate_fn: Callable[..., Any] | None) -> None:
        self.dataset = dataset
        self.sampler = sampler
        # Each epoch torch draws a seed for workers; from a generator of its own, so that dropout is left alone.
        self._loader = DataLoader(
            dataset, batch_sampler=_Order(sampler), collate_fn=collate_fn, generator=torch.Generator()
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.sampler.advance()
            yield batch
