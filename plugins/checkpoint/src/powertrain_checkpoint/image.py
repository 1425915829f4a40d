"""What a shard's file will be, byte by byte, before any of it is written.

The format (https://github.com/huggingface/safetensors#format): eight bytes
with the header's length, little-endian; the header, a JSON object that maps
each key to its type, shape and byte range; the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs

from powertrain_checkpoint.dtypes import SIZES
from powertrain_checkpoint.manifest import BLOCK

if TYPE_CHECKING:
    from powertrain.roles.checkpoint import TensorSlice

HEAD = -1
"""In the place of an entry's number: the header."""


@attrs.frozen
class Entry:
    """One tensor of a file: its key, its type (a safetensors code) and its shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * SIZES[self.dtype]


def header(entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> bytes:
    """Return the bytes before the first tensor, padded so that the data is 8-byte aligned."""
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        table[entry.key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (start, end)}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@attrs.frozen(eq=False)
class Part:
    """Some bytes of the file, at most ``BLOCK``, and where they come from.

    Attributes:
        entry: the number of the file's entry that they belong to, or ``HEAD``.
        offset: the first one's place in the file.
        piece: what they are.
    """

    entry: int
    offset: int
    piece: TensorSlice

    @property
    def nbytes(self) -> int:
        """How many they are."""
        return self.piece.tensor.numel() * self.piece.tensor.element_size()


class Image:
    """A file of some entries.

    Args:
        entries: in the order of the file.

    Attributes:
        head: the bytes before the first entry's.
        size: of the file, in bytes.
        entries: as given.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self.head = header(entries)
        self.size = len(self.head) + sum(entry.nbytes for entry in entries)

    def parts(self, pieces: Sequence[TensorSlice]) -> Iterator[Part]:
        """Yield the file in order; a part of an entry starts at a multiple of ``BLOCK`` in it.

        Args:
            pieces: the content of each entry.
        """
        import torch

        from powertrain.roles.checkpoint import TensorSlice

        head = torch.frombuffer(bytearray(self.head), dtype=torch.uint8)
        yield from _cut(HEAD, 0, TensorSlice("header", tuple(head.shape), head), 1)
        offset = len(self.head)
        for number, (entry, piece) in enumerate(zip(self.entries, pieces, strict=True)):
            yield from _cut(number, offset, piece, SIZES[entry.dtype])
            offset += entry.nbytes

    def checksums(self, found: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
        """Return each entry's checksums, from (entry, checksum) of parts, those of one entry in order."""
        result: list[list[int]] = [[] for _ in self.entries]
        for entry, checksum in found:
            if entry != HEAD:
                result[entry].append(checksum)
        return tuple(map(tuple, result))


def _cut(number: int, offset: int, piece: TensorSlice, size: int) -> Iterator[Part]:
    step = BLOCK // size
    count = piece.tensor.numel()
    if 0 < count <= step:
        yield Part(number, offset, piece)
        return
    for start in range(0, count, step):
        yield Part(number, offset + start * size, piece.narrow(start, min(start + step, count)))
