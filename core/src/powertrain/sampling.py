"""The default sampler, and the loader that feeds an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from powertrain.config.batch import BatchSizes
from powertrain.errors import DataError
from powertrain.roles.sampler import Sampler


class EpochSampler(Sampler):
    """Shuffles the dataset anew each epoch and deals it out in global batches.

    The order depends on the seed and the epoch alone; global batch k is
    positions ``k * total`` to ``(k + 1) * total`` of it, whatever the number of
    ranks. The incomplete batch at an epoch's end is left out.
    """

    kind = "epoch"

    def __init__(self, length: int, sizes: BatchSizes, data_rank: int, data_size: int, seed: int) -> None:
        if length < sizes.total:
            product = f"micro {sizes.micro} x accumulation {sizes.accumulation} x {data_size} ranks"
            raise DataError(
                f"the dataset has {length} samples, fewer than one global batch",
                expected=f"at least {sizes.total} = {product}",
                remedy="lower `[batch] total` or `micro`, or use more data",
            )
        self.length, self.sizes, self.seed = length, sizes, seed
        self.local = sizes.total // data_size
        self.first = data_rank * self.local
        self.epoch = 0
        self.consumed = 0

    def __len__(self) -> int:
        return self.length // self.sizes.total

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.length, generator=generator)
        for start in range(self.consumed, self.length - self.sizes.total + 1, self.sizes.total):
            yield order[start + self.first : start + self.first + self.local].tolist()

    def advance(self) -> None:
        """Count one batch as taken."""
        self.consumed += self.sizes.total
        self._roll_over()

    def state(self) -> dict[str, Any]:
        """Return epoch and samples taken in it, and what the order depends on."""
        return {
            "kind": self.kind,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "length": self.length,
            "seed": self.seed,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, on any number of ranks and with any batch sizes.

        Raises:
            DataError: the state is of another dataset, seed or kind of sampler.
        """
        for key, own, remedy in (
            ("kind", self.kind, "train with the sampler that the checkpoint was made with"),
            ("length", self.length, "use the dataset of the checkpoint"),
            ("seed", self.seed, f"set `[run] seed = {state.get('seed')}` to continue the order of the checkpoint"),
        ):
            if state.get(key) != own:
                raise DataError(
                    f"the saved position belongs to another order of samples: its {key} differs",
                    expected=f"{key} = {state.get(key)}",
                    found=f"{key} = {own}",
                    remedy=remedy,
                )
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self._roll_over()

    def _roll_over(self) -> None:
        """Begin the next epoch when what is left of this one fills no global batch."""
        if self.consumed + self.sizes.total > self.length:
            self.epoch, self.consumed = self.epoch + 1, 0
        if self.consumed + self.sizes.total > self.length:
            self.epoch, self.consumed = self.epoch + 1, 0


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
