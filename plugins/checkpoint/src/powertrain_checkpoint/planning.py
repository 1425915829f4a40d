"""Who writes what, and who reads what from where: torch.distributed.checkpoint's planner over N-d boxes.

Only the planner's public data types and functions are used. No process group
is touched: ranks exchange their plans as JSON through the communicator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from powertrain.errors import CheckpointError
from powertrain_checkpoint.dtypes import SIZES, from_torch
from powertrain_checkpoint.image import Entry
from powertrain_checkpoint.manifest import Tensor

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem

    from powertrain.layout import Box
    from powertrain.roles.checkpoint import TensorSlice

Key = tuple[str, tuple[int, ...]]
"""A chunk's identity: its tensor's name and its offsets."""


@attrs.frozen
class Piece:
    """A chunk that some rank writes."""

    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def key(self) -> Key:
        """Its identity among all chunks."""
        return self.name, self.offsets

    @property
    def entry(self) -> Entry:
        """Its place in a safetensors file."""
        return Entry(f"{self.name}|{','.join(map(str, self.offsets))}", self.dtype, self.sizes)


@attrs.frozen
class Plan:
    """A save, as all ranks see it.

    Attributes:
        tensors: shape and type (a safetensors code) of every tensor, by name.
        pieces: for each rank, the chunks that it writes, in the order of its file.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    pieces: tuple[tuple[Piece, ...], ...]


def describe(slices: Sequence[TensorSlice]) -> list[Any]:
    """Return what a rank holds, as JSON: name, shape, type and boxes of each slice."""
    return [
        [
            item.name,
            list(item.shape),
            from_torch(item.tensor.dtype),
            [[list(box.offsets), list(box.sizes)] for box, _ in item.chunks()],
        ]
        for item in slices
    ]


def plan_save(holdings: Sequence[list[Any]]) -> Plan:
    """Choose the rank that writes each chunk, given every rank's ``describe``.

    Each replica is written once, and the work is spread over the ranks that hold it.

    Raises:
        CheckpointError: ranks disagree about a tensor, or their slices leave gaps or overlap.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    for rank, items in enumerate(holdings):
        for name, shape, dtype, _ in items:
            if tensors.setdefault(name, (tuple(shape), dtype)) != (tuple(shape), dtype):
                raise CheckpointError(
                    f"ranks disagree about {name}",
                    where=f"rank {rank}",
                    expected=_words(*tensors[name]),
                    found=_words(tuple(shape), dtype),
                    remedy="give every rank's slices the tensor's global shape and one element type",
                )
    planner = DefaultSavePlanner(flatten_state_dict=False)
    try:
        plans, _ = planner.create_global_plan([_local_plan(items) for items in holdings])
    except ValueError as error:
        raise CheckpointError(
            "the ranks' slices do not make up whole tensors",
            found=str(error),
            remedy="each element must be held by one rank, or by several in equal slices",
        ) from error
    pieces = tuple(tuple(sorted(map(_piece, plan.items), key=_file_order)) for plan in plans)
    _check_complete(tensors, pieces)
    return Plan(tensors, pieces)


def _local_plan(items: list[Any]) -> SavePlan:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    from powertrain_checkpoint.dtypes import to_torch

    result = []
    for name, shape, dtype, chunks in items:
        properties, size = TensorProperties(dtype=to_torch(dtype)), torch.Size(shape)
        for offsets, sizes in chunks:
            chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            data = TensorWriteData(chunk=chunk, properties=properties, size=size)
            result.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
    return SavePlan(result)


def _piece(item: WriteItem) -> Piece:
    data = item.tensor_data
    assert data is not None  # every item of ours is a tensor
    offsets, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
    return Piece(item.index.fqn, from_torch(data.properties.dtype), offsets, sizes)


def _file_order(piece: Piece) -> tuple[int, Key]:
    # Larger elements first: then every chunk is aligned although the format allows no gaps.
    return -SIZES[piece.dtype], piece.key


def _check_complete(tensors: Mapping[str, tuple[tuple[int, ...], str]], pieces: Sequence[Sequence[Piece]]) -> None:
    # torch's planner checks the volume only among several ranks, and not of 0-d tensors.
    missing = {name: math.prod(shape) for name, (shape, _) in tensors.items()}
    for piece in (piece for part in pieces for piece in part):
        missing[piece.name] -= math.prod(piece.sizes)
    if wrong := [name for name, count in missing.items() if count]:
        raise CheckpointError(
            f"the ranks' slices do not make up whole tensors: {', '.join(wrong[:10])}",
            found=f"{missing[wrong[0]]:+,} elements missing from {wrong[0]}",
            remedy="each element must be held by one rank, or by several in equal slices",
        )


def _words(shape: tuple[int, ...], dtype: str) -> str:
    return f"{dtype} of shape {list(shape)}"


@attrs.frozen
class Copy:
    """A part of a saved chunk that goes to a part of a rank's box.

    Attributes:
        chunk: the saved chunk's index in its tensor.
        source: the part's first index in the chunk.
        target: the rank's box, by its index.
        destination: the part's first index in that box.
        lengths: the part's extent.
    """

    chunk: int
    source: tuple[int, ...]
    target: int
    destination: tuple[int, ...]
    lengths: tuple[int, ...]


class ReadPlanner:
    """Finds which parts of a checkpoint's chunks fill given boxes; keeps torch's form of the manifest."""

    def __init__(self) -> None:
        self._metadata: dict[str, Any] = {}

    def plan(self, name: str, tensor: Tensor, boxes: Sequence[Box]) -> list[Copy]:
        """Return the copies that fill ``boxes`` of ``tensor``."""
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        if name not in self._metadata:
            self._metadata[name] = _metadata(tensor)
        metadata, by_offset = self._metadata[name]
        targets = {box.offsets: index for index, box in enumerate(boxes)}
        wanted = [_chunk(box.offsets, box.sizes) for box in boxes]
        return [
            Copy(
                by_offset[_offset(item.storage_index.offset)],
                tuple(item.storage_offsets),
                targets[_offset(item.dest_index.offset)],
                tuple(item.dest_offsets),
                tuple(item.lengths),
            )
            for item in create_read_items_for_chunk_list(name, metadata, wanted)
        ]


def _metadata(tensor: Tensor) -> tuple[Any, dict[tuple[int, ...], int]]:
    import torch
    from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

    chunks = [_chunk(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]
    metadata = TensorStorageMetadata(TensorProperties(), torch.Size(tensor.shape), chunks)
    return metadata, {chunk.offsets: index for index, chunk in enumerate(tensor.chunks)}


def _chunk(offsets: Sequence[int], sizes: Sequence[int]) -> ChunkStorageMetadata:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))


def _offset(offset: torch.Size | None) -> tuple[int, ...]:
    return () if offset is None else tuple(offset)
