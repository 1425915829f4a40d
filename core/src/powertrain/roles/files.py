"""The file engine role: how bytes travel between memory and files, many at a time.

Who needs it (tiers on a disk, checkpoints) asks the hook ``make_file_engine``, and finds
another way where there is none. This module imports no torch: what travels are buffers.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Protocol

Path = str | os.PathLike[str]


class Transfer(Protocol):
    """A read or write under way. Its buffer must be left alone until ``wait`` returns."""

    def wait(self) -> None:
        """Return when every byte has been moved.

        Raises:
            TransferFailed: it failed, or came out short; with the file, and expected and actual bytes.
        """

    def done(self) -> bool:
        """Return whether ``wait`` would return at once."""


class RandomFile(ABC):
    """One logical file, open for transfers at any offset. Use it in a ``with`` block, or ``close`` it.

    Attributes:
        size: in bytes, as it was opened or last ``resize``d.
    """

    size: int

    @abstractmethod
    def read(self, offset: int, into: memoryview) -> Transfer:
        """Start to fill ``into`` (writable, contiguous) with the bytes from ``offset`` on.

        Any offset and length will do; multiples of the engine's ``alignment``, into memory
        of its ``buffer``, go past the page cache.
        """

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> Transfer:
        """Start to write ``data`` (contiguous) at ``offset``."""

    @abstractmethod
    def resize(self, size: int) -> None:
        """Make the file ``size`` bytes long, with the space set aside where the file system can.

        Raises:
            StorageFull: the disk has less.
        """

    @abstractmethod
    def sync(self) -> None:
        """Wait for all transfers, then force what was written to the disk.

        Raises:
            TransferFailed: the disk refused.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for all transfers and close; a second call does nothing."""

    def __enter__(self) -> RandomFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileEngine(ABC):
    """Moves bytes between memory and files.

    Attributes:
        name: of the way it works ("uring", "direct", "threads").
        alignment: of offsets, lengths and addresses, in bytes, at which it is fastest.
    """

    name: str
    alignment: int

    @abstractmethod
    def buffer(self, nbytes: int) -> memoryview:
        """Return writable memory for transfers, aligned, with arbitrary content; freed with its last reference."""

    @abstractmethod
    def open(self, paths: Path | Sequence[Path], mode: Literal["create", "read", "update"]) -> RandomFile:
        """Open one logical file.

        Args:
            paths: the file; or several, on different disks, over which its content is striped, always the
                same in the same order.
            mode: "create" makes new, empty files and fails if one exists; "read" and "update" open what is there.

        Raises:
            StorageUnwritable: it cannot be opened.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for all transfers and give threads and queues up; a second call does nothing."""
