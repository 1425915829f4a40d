"""Checkpoints in a dictionary: the smallest store that keeps the role's promises."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from powertrain.errors import CheckpointError, CheckpointMissing
from powertrain.layout import Box
from powertrain.roles.checkpoint import CheckpointReader, CheckpointStore, Snapshot, TensorInfo, TensorSlice
from powertrain.roles.communicator import Communicator

Chunk = tuple[Box, torch.Tensor]


@attrs.define(eq=False)
class Shelf:
    """What the stores of one place share.

    Attributes:
        complete: the finished checkpoints by tag, oldest first.
        pending: what ranks have handed over of a save under way.
    """

    complete: dict[str, MemoryReader] = attrs.field(factory=dict)
    pending: dict[int, Snapshot] = attrs.field(factory=dict)
    lock: threading.Lock = attrs.field(factory=threading.Lock)


class MemoryReader(CheckpointReader):
    """A checkpoint whose tensors lie in memory, whole.

    Args:
        tag: its name.
        snapshots: what each rank gave.

    Raises:
        CheckpointError: a part of a tensor is given by no rank.
    """

    def __init__(self, tag: str, snapshots: Sequence[Snapshot]) -> None:
        self.tag = tag
        self.values: Mapping[str, Any] = json.loads(json.dumps(snapshots[0].values))
        self.rank_values = [json.loads(json.dumps(snapshot.rank_values)) for snapshot in snapshots]
        self.whole: dict[str, torch.Tensor] = {}
        covered: dict[str, torch.Tensor] = {}
        for piece in (piece for snapshot in snapshots for piece in snapshot.tensors):
            whole = self.whole.setdefault(piece.name, torch.empty(piece.shape, dtype=piece.tensor.dtype))
            seen = covered.setdefault(piece.name, torch.zeros(piece.shape, dtype=torch.bool))
            for box, chunk in piece.chunks():
                whole[_index(box)] = chunk
                seen[_index(box)] = True
        for name, seen in covered.items():
            if not bool(seen.all()):
                raise CheckpointError(f"no rank gave all of {name!r}")
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self.whole.items()}

    def read(self, slices: Sequence[TensorSlice]) -> None:
        """Fill the slices in place."""
        for piece in slices:
            whole = self.whole.get(piece.name)
            if whole is None or tuple(whole.shape) != tuple(piece.shape):
                found = "no such tensor" if whole is None else f"shape {tuple(whole.shape)}"
                raise CheckpointError(
                    f"{piece.name!r} cannot be read", expected=f"shape {tuple(piece.shape)}", found=found
                )
            for box, chunk in piece.chunks():
                chunk.copy_(whole[_index(box)])


class MemoryStore(CheckpointStore):
    """One rank's view of a shelf.

    Args:
        shelf: shared by all ranks, which must be threads of one process.
        communicator: connects them.
    """

    def __init__(self, shelf: Shelf, communicator: Communicator) -> None:
        self._shelf = shelf
        self._communicator = communicator
        self._news: list[str] = []

    def tags(self) -> list[str]:
        """Return the tags, oldest first."""
        return list(self._shelf.complete)

    def save(self, tag: str, snapshot: Snapshot, *, asynchronous: bool = False) -> None:
        """Hand over this rank's copy; the first rank puts all of them together."""
        failure = ""
        try:
            copied = _copy(snapshot)
            with self._shelf.lock:
                self._shelf.pending[self._communicator.rank] = copied
        except (TypeError, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"
        failures = [text for text in self._communicator.gather_json(failure) if text]
        if not failures and self._communicator.rank == 0:
            try:
                snapshots = [snapshot for _, snapshot in sorted(self._shelf.pending.items())]
                if any(snapshot.values != snapshots[0].values for snapshot in snapshots):
                    raise CheckpointError("values differ between ranks")
                reader = MemoryReader(tag, snapshots)
            except CheckpointError as error:
                failures = [str(error)]
            else:
                self._shelf.complete.pop(tag, None)
                self._shelf.complete[tag] = reader
        failures += self._communicator.gather_json(failures)[0]
        if self._communicator.rank == 0:
            self._shelf.pending.clear()
        self._communicator.barrier().wait()
        if failures:
            raise CheckpointError(f"checkpoint {tag!r} was not saved", found=failures[0])
        self._news.append(tag)

    def poll(self) -> list[str]:
        """Return what was saved since the last call."""
        news, self._news = self._news, []
        return news

    def wait(self) -> list[str]:
        """Return what was saved since the last call; nothing is ever under way."""
        return self.poll()

    def open(self, tag: str | None = None) -> CheckpointReader:
        """Open ``tag`` or the newest."""
        name = tag if tag is not None else next(reversed(self._shelf.complete), None)
        if name is None or name not in self._shelf.complete:
            raise CheckpointMissing(f"there is no checkpoint {tag!r}" if tag else "there is no checkpoint")
        return self._shelf.complete[name]

    def prune(self, keep: int, pattern: str = ".*") -> None:
        """Forget all but the newest ``keep`` whose tag matches."""
        self._communicator.barrier().wait()
        if self._communicator.rank == 0:
            for tag in [tag for tag in self._shelf.complete if re.fullmatch(pattern, tag)][:-keep]:
                del self._shelf.complete[tag]
        self._communicator.barrier().wait()


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))


def _copy(snapshot: Snapshot) -> Snapshot:
    for piece in snapshot.tensors:
        limit = math.prod(piece.shape if piece.block is None else piece.block.sizes)
        if piece.start + piece.tensor.numel() > limit:
            raise ValueError(f"the slice of {piece.name!r} leaves its tensor")
    values, rank_values = json.loads(json.dumps([snapshot.values, snapshot.rank_values]))
    tensors = [attrs.evolve(piece, tensor=piece.tensor.detach().clone()) for piece in snapshot.tensors]
    return Snapshot(tensors=tensors, values=values, rank_values=rank_values)
