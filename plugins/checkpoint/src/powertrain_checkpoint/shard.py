"""One shard: a file in the safetensors format, written through a file engine and checked by blocks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import attrs

from powertrain.errors import ShardCorrupt, ShardMissing, ShardTruncated
from powertrain.roles.files import FileEngine, RandomFile
from powertrain_checkpoint.image import Entry, Image
from powertrain_checkpoint.manifest import BLOCK, Chunk, File


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


class Content(Protocol):
    """What is in a shard, and how it gets there.

    Attributes:
        engine: opens the file.
    """

    engine: FileEngine

    def write(self, file: RandomFile, image: Image) -> tuple[tuple[int, ...], ...]:
        """Write all of ``image``; return the checksums of each entry's blocks.

        Raises:
            TransferFailed: the disk refused.
        """


def write(path: Path, entries: Sequence[Entry], content: Content) -> Written:
    """Write a shard and force it to the disk; space for all of it is set aside first, where the file system can.

    Entries whose elements are larger should come first, so that all are aligned.

    Raises:
        StorageFull: there is less space.
        StorageError, OSError: the disk refused.
    """
    image = Image(entries)
    with open_sized(path, image.size, content.engine) as file:
        checksums = content.write(file, image)
        file.sync()
    return Written(image.size, len(image.head), zlib.crc32(image.head), checksums)


def open_sized(path: Path, size: int, engine: FileEngine) -> RandomFile:
    """Open a file for writing, ``size`` bytes long, whether or not it is there; close it.

    Raises:
        StorageFull: there is less space.
        StorageError, OSError: the disk refused.
    """
    path.touch()  # with the permissions of any other file of this user; an engine's own files are private
    file = engine.open(path, "update")
    try:
        file.resize(size)
    except BaseException:
        file.close()
        raise
    return file


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
