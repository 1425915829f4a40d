"""One shard: a file in the safetensors format, written as a stream and checked by blocks.

The format (https://github.com/huggingface/safetensors#format): eight bytes
with the header's length, little-endian; the header, a JSON object that maps
each key to its type, shape and byte range; the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import attrs

from powertrain.errors import ShardCorrupt, ShardMissing, ShardTruncated
from powertrain_checkpoint.dtypes import SIZES
from powertrain_checkpoint.manifest import BLOCK, Chunk, File


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


@attrs.frozen
class Written:
    """What a finished file looks like.

    Attributes:
        size: of the file, in bytes.
        header_size: bytes before the first tensor.
        header_checksum: the CRC-32 of these.
        checksums: for each entry, the CRC-32 of each of its blocks.
    """

    size: int
    header_size: int
    header_checksum: int
    checksums: tuple[tuple[int, ...], ...]


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


def write(path: Path, entries: Sequence[Entry], buffers: Iterable[memoryview]) -> Written:
    """Write a shard, each entry's bytes from the buffer at its place, and force it to the disk.

    Entries whose elements are larger should come first, so that all are aligned.

    Raises:
        OSError: the disk refused.
    """
    head = header(entries)
    checksums = []
    with path.open("wb", buffering=BLOCK // 4) as file:
        file.write(head)
        for buffer in buffers:
            blocks = []
            for start in range(0, len(buffer), BLOCK):
                block = buffer[start : start + BLOCK]
                blocks.append(zlib.crc32(block))
                file.write(block)
            checksums.append(tuple(blocks))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return Written(size, len(head), zlib.crc32(head), tuple(checksums))


def check_size(path: Path, expected: int) -> None:
    """Compare a file's size with the manifest's.

    Raises:
        ShardMissing: it is not there.
        ShardTruncated: it has another size.
    """
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise ShardMissing(f"the manifest lists {path.name}, which is not there", where=str(path)) from None
    if found != expected:
        raise ShardTruncated(
            f"{path.name} is {'shorter' if found < expected else 'longer'} than when it was saved",
            where=str(path),
            expected=f"{expected:,} bytes",
            found=f"{found:,} bytes",
        )


class Shard:
    """A shard open for reading. Use it in a ``with`` block.

    Raises:
        ShardMissing, ShardTruncated, ShardCorrupt: on entering, if the file or its header is damaged.
    """

    def __init__(self, directory: Path, file: File) -> None:
        self.path = directory / file.name
        self._record = file
        self._file: IO[bytes]

    def __enter__(self) -> Shard:
        check_size(self.path, self._record.size)
        self._file = self.path.open("rb", buffering=0)
        try:
            head = self._read(0, memoryview(bytearray(self._record.header_size)))
            if zlib.crc32(head) != self._record.header_checksum:
                raise self._corrupt(0, self._record.header_size)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, chunk: Chunk, length: int, start: int, stop: int, buffer: bytearray) -> memoryview:
        """Return bytes ``start..stop`` of a chunk of ``length`` bytes, once their blocks are verified.

        The result is a view of ``buffer``, which must hold the blocks that the
        range touches: up to ``stop - start + 2 * BLOCK`` bytes.

        Raises:
            ShardCorrupt: a block does not match its checksum.
        """
        first = start // BLOCK
        low, high = first * BLOCK, min(-(-stop // BLOCK) * BLOCK, length)
        view = self._read(chunk.start + low, memoryview(buffer)[: high - low])
        for index, at in enumerate(range(0, high - low, BLOCK)):
            if zlib.crc32(view[at : at + BLOCK]) != chunk.checksums[first + index]:
                raise self._corrupt(chunk.start + low + at, min(BLOCK, high - low - at))
        return view[start - low : stop - low]

    def _read(self, start: int, view: memoryview) -> memoryview:
        self._file.seek(start)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise ShardTruncated(f"{self.path.name} ends within a tensor", where=str(self.path))
            done += count
        return view

    def _corrupt(self, start: int, length: int) -> ShardCorrupt:
        return ShardCorrupt(
            f"{self.path.name} was altered after it was saved",
            where=f"{self.path}, bytes {start:,} to {start + length:,}",
        )


def pieces(length: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut ``length`` bytes into ranges of at most ``limit``."""
    for start in range(0, length, limit):
        yield start, min(start + limit, length)
