"""How parameters and gradients travel between their ranks, uncompressed.

A wire turns shards into a whole flat buffer (``gather``) and a whole buffer into
the mean of this rank's shard (``reduce``). Buffers are views of what they belong
to: nothing is copied in or out.
"""

from __future__ import annotations

from typing import Protocol

import torch

from powertrain.roles.communicator import Communicator, Handle


class GatherWire(Protocol):
    """Brings the shards of a flat buffer together.

    Attributes:
        exact: what arrives is what was sent, as far as the whole buffer's type holds it.
    """

    exact: bool

    def gather(self, full: torch.Tensor, shard: torch.Tensor, label: str) -> Handle:
        """Fill ``full`` (ranks x numel) with the ranks' ``shard`` (numel, perhaps of another type)."""


class ReduceWire(Protocol):
    """Averages a flat buffer over the ranks."""

    def reduce(self, output: torch.Tensor, whole: torch.Tensor, label: str) -> Handle:
        """Fill ``output`` (numel) with this rank's piece of the mean of ``whole`` (ranks x numel), which may change.

        ``output`` may be that very piece of ``whole``.
        """


class PlainGather:
    """All-gather along one dimension, in the type of the whole buffer."""

    exact = True

    def __init__(self, communicator: Communicator, dimension: str) -> None:
        self._communicator = communicator
        self._dimension = dimension

    def gather(self, full: torch.Tensor, shard: torch.Tensor, label: str) -> Handle:
        """Gather in place; a shard of another type is converted into its own place first."""
        if shard.dtype != full.dtype:
            index, size = self._communicator.index(self._dimension), shard.numel()
            own = full[index * size : (index + 1) * size]
            own.copy_(shard)
            shard = own
        return self._communicator.all_gather(full, shard, self._dimension, label=label)


class PlainReduce:
    """Reduce-scatter of the mean along one dimension."""

    def __init__(self, communicator: Communicator, dimension: str) -> None:
        self._communicator = communicator
        self._dimension = dimension

    def reduce(self, output: torch.Tensor, whole: torch.Tensor, label: str) -> Handle:
        """Reduce to where the shard rests."""
        return self._communicator.reduce_scatter(
            output, whole, self._dimension, reduction="mean", label=label, lossy=output.numel()
        )
