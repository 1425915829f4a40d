"""The checkpoint role: where state is kept, independent of any layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from powertrain.errors import CheckpointError
from powertrain.layout import Box, boxes
from powertrain.roles.communicator import Handle
from powertrain.roles.tier import DeviceSlot, Lease, Slot


class Loan:
    """Some elements of a slice in memory, until ``store`` or ``release``: a ``Lease`` with a type."""

    def __init__(self, lease: Lease, dtype: torch.dtype) -> None:
        self._lease, self._dtype = lease, dtype

    def wait(self) -> torch.Tensor:
        """Return the elements, flat, when they are here."""
        return self._lease.wait().view(self._dtype)

    def store(self) -> Handle:
        """Start to keep what was written into them; they are not to be touched any more."""
        return self._lease.store()

    def release(self) -> None:
        """Keep what rests."""
        self._lease.release()


@attrs.frozen(eq=False)
class TensorSlice:
    """The part of a global tensor that one rank holds: a flat slice of a block of it.

    Attributes:
        name: the global name, the same under every layout ("model/blocks.0.weight").
        shape: the global shape.
        tensor: the elements, flat and contiguous; loading writes into it. On the meta device where they rest
            elsewhere, and come by ``lend``.
        start: the first element, counted in the block's row-major order.
        block: the part of the tensor that ``start`` counts in; None for all of it.
        slot: where the elements rest; None where ``tensor`` has them.
        first: their first byte in the slot.
    """

    name: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    start: int = 0
    block: Box | None = None
    slot: Slot | None = None
    first: int = 0

    @classmethod
    def at_rest(
        cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, numel: int, start: int, slot: Slot, first: int
    ) -> TensorSlice:
        """Return a slice of ``numel`` elements that rest in ``slot`` from byte ``first`` on."""
        return cls(name, shape, torch.empty(numel, dtype=dtype, device="meta"), start, None, slot, first)

    def narrow(self, start: int, stop: int) -> TensorSlice:
        """Return elements ``start`` to ``stop`` of the slice as a slice."""
        part = self.tensor.detach().view(-1)[start:stop]
        first = self.first + start * part.element_size()
        return attrs.evolve(self, tensor=part, start=self.start + start, first=first)

    def lend(self, start: int = 0, stop: int | None = None, *, blank: bool = False) -> Loan:
        """Start to bring elements ``start`` to ``stop`` of the slice into the host's memory, or lend it for new ones.

        Elements that lie in memory are lent where they lie, on their device.
        """
        end = self.tensor.numel() if stop is None else stop
        size = self.tensor.element_size()
        if self.slot is None:
            flat = self.tensor.view(-1)
            return Loan(DeviceSlot(flat[start:end].view(torch.uint8)).fetch(), self.tensor.dtype)
        take = self.slot.blank if blank else self.slot.fetch
        lease = take(self.first + start * size, self.first + end * size, torch.device("cpu"))
        return Loan(lease, self.tensor.dtype)

    def chunks(self) -> list[tuple[Box, torch.Tensor]]:
        """Return the slice as boxes of the global tensor, each with its elements (views; meta where they rest)."""
        sizes = self.shape if self.block is None else self.block.sizes
        shift = (0,) * len(self.shape) if self.block is None else self.block.offsets
        flat = self.tensor.view(-1)
        result, taken = [], 0
        for box in boxes(sizes, self.start, self.start + flat.numel()):
            offsets = tuple(a + b for a, b in zip(box.offsets, shift, strict=True))
            piece = flat[taken : taken + box.numel].view(box.sizes)
            result.append((Box(offsets, box.sizes), piece))
            taken += box.numel
        return result


@attrs.frozen
class TensorInfo:
    """What a checkpoint knows of one tensor.

    Attributes:
        shape: the global shape.
        dtype: the element type it was saved in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@attrs.frozen(kw_only=True)
class Snapshot:
    """What one rank hands over to be saved.

    Attributes:
        tensors: its slices; replicas may be given by every rank, one is written.
        values: JSON that is the same on every rank.
        rank_values: JSON that is this rank's own.
    """

    tensors: Sequence[TensorSlice]
    values: Mapping[str, Any]
    rank_values: Mapping[str, Any]


class CheckpointReader(ABC):
    """One complete checkpoint, open for reading.

    Attributes:
        tag: its name within the directory.
        tensors: every tensor in it.
        values: the JSON that all ranks shared.
        rank_values: the JSON of each rank that saved, by rank.
    """

    tag: str
    tensors: Mapping[str, TensorInfo]
    values: Mapping[str, Any]
    rank_values: Sequence[Mapping[str, Any]]

    @abstractmethod
    def read(self, slices: Sequence[TensorSlice]) -> None:
        """Fill the slices in place, converting element types; each rank reads what it needs.

        Called on every rank, the same number of times, so that a damaged file
        fails them all; a rank that needs nothing passes an empty sequence.

        Raises:
            CheckpointError: a name or shape is not in the checkpoint, or a file is damaged.
        """


class CheckpointStore(ABC):
    """Checkpoints under one directory, addressed by tag.

    All methods but ``abandon`` and ``close`` are called on every rank, in the
    same order, and return or raise the same on every rank.
    """

    @abstractmethod
    def tags(self) -> list[str]:
        """Return the tags of complete checkpoints, oldest first."""

    @abstractmethod
    def save(self, tag: str, snapshot: Snapshot, *, asynchronous: bool = False) -> None:
        """Save under ``tag``; visible only when whole.

        With ``asynchronous``, returns once the snapshot's tensors may change
        again; ``poll`` or ``wait`` tells how it ended.

        Raises:
            CheckpointWriteFailed: the disk refused, on this rank or another.
            CheckpointError: values are not JSON on some rank, or ``values`` differ between
                ranks; raised on all of them.
        """

    @abstractmethod
    def poll(self) -> list[str]:
        """Return the tags that became complete on every rank since the last call, without waiting for a save.

        The ranks agree: all of them learn in the same call that a save ended. While
        none is under way it costs nothing; the engine calls it at each step's end.

        Raises:
            CheckpointWriteFailed: an asynchronous save failed on some rank; raised on all, in the same call.
        """

    @abstractmethod
    def wait(self) -> list[str]:
        """Wait for asynchronous saves, then as ``poll``."""

    @abstractmethod
    def open(self, tag: str | None = None) -> CheckpointReader:
        """Open ``tag``, or the newest complete checkpoint.

        Raises:
            CheckpointMissing: there is none.
            ManifestMissing, ShardMissing, ShardTruncated, ShardCorrupt: it is damaged.
        """

    def open_weights(self) -> CheckpointReader:
        """Open what the store's place holds as plain weights, in a format of model libraries, that no run has saved.

        The reader's tensors are called ``model/<name>``. Its ``read`` is local: each rank
        reads what it needs, when it needs it, and only that.

        Raises:
            CheckpointMissing: there are none.
            ShardMissing, ShardTruncated, ShardCorrupt: a file is damaged.
            CheckpointError: the store reads no such files.
        """
        raise CheckpointError(
            f"{type(self).__name__} reads no plain weights", remedy="give a path: weights=DIRECTORY reads safetensors"
        )

    @abstractmethod
    def prune(self, keep: int, pattern: str = ".*") -> None:
        """Delete all but the newest ``keep`` of the complete checkpoints whose whole tag matches ``pattern``.

        ``pattern`` is a regular expression; other checkpoints are neither deleted nor counted.
        """

    def abandon(self) -> None:
        """Give up, within seconds, what other ranks may never finish: the run has failed. ``close`` follows.

        Called on the ranks that still can, in no order; it must use no collective.
        Complete checkpoints stay as they are.
        """

    def close(self) -> None:
        """Wait for what is under way and release threads."""
