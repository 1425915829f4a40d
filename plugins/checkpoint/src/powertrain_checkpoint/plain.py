"""The file engine of stores where none is installed: ordinary calls of the system, through the page cache."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Literal

from powertrain.errors import StorageFull, StorageUnwritable, TransferFailed
from powertrain.roles.files import FileEngine, RandomFile
from powertrain.roles.files import Path as FilePath

_FLAGS = {"create": os.O_RDWR | os.O_CREAT | os.O_EXCL, "read": os.O_RDONLY, "update": os.O_RDWR}


class PlainEngine(FileEngine):
    """Moves bytes at once: a transfer is over when it has been started."""

    name = "plain"
    alignment = 4096

    def buffer(self, nbytes: int) -> memoryview:
        """Return memory that starts at a page."""
        return memoryview(mmap.mmap(-1, max(nbytes, 1)))[:nbytes]

    def open(self, paths: FilePath | Sequence[FilePath], mode: Literal["create", "read", "update"]) -> PlainFile:
        """Open a file.

        Raises:
            StorageUnwritable: it cannot be opened.
            ValueError: several paths: bytes are not spread over disks here.
        """
        if not isinstance(paths, str | os.PathLike):
            raise ValueError(f"expected one path, found {len(paths)}")
        path = os.fspath(paths)
        try:
            return PlainFile(path, os.open(path, _FLAGS[mode] | os.O_CLOEXEC, 0o666))
        except OSError as error:
            raise StorageUnwritable(f"{path} cannot be opened: {error.strerror}", where=path) from error

    def close(self) -> None:
        """Do nothing: nothing is under way."""


class PlainFile(RandomFile):
    """One file.

    Args:
        path: of it, for people.
        descriptor: of it; the file closes it.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self.size = os.fstat(descriptor).st_size

    def read(self, offset: int, into: memoryview) -> Over:
        """Fill ``into``."""
        return self._move(offset, into, writes=False)

    def write(self, offset: int, data: memoryview) -> Over:
        """Write ``data``."""
        return self._move(offset, data, writes=True)

    def _move(self, offset: int, view: memoryview, *, writes: bool) -> Over:
        done, reason = 0, ""
        while done < len(view) and not reason:
            try:
                call = os.pwritev if writes else os.preadv
                count = call(self._descriptor, [view[done:]], offset + done)
                reason = "" if count else "the file ended"
                done += count
            except OSError as error:
                reason = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"
        if not reason:
            return Over()
        return Over(
            TransferFailed(
                f"{'writing to' if writes else 'reading'} {self._path} failed: {reason}",
                where=f"{self._path}, byte {offset + done}",
                expected=f"{len(view)} bytes {'to' if writes else 'from'} byte {offset}",
                found=f"{done} bytes before it failed",
            )
        )

    def resize(self, size: int) -> None:
        """Make the file ``size`` bytes long, if the disk says that it has so many; none are set aside.

        Raises:
            StorageFull: it has less.
            OSError: the system refuses such a file.
        """
        found = os.fstatvfs(self._descriptor)
        free = found.f_bavail * found.f_frsize
        if found.f_blocks and size - self.size > free:
            raise StorageFull(
                f"there is no room for {self._path}",
                where=self._path,
                expected=f"{size - self.size:,} bytes of free space",
                found=f"{free:,} bytes",
            )
        os.ftruncate(self._descriptor, size)
        self.size = size

    def sync(self) -> None:
        """Force what was written to the disk.

        Raises:
            TransferFailed: the disk refused.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise TransferFailed(
                f"forcing {self._path} to the disk failed: {error.strerror}", where=self._path
            ) from error

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Over:
    """A transfer that is over.

    Args:
        error: how it failed, if it did.
    """

    def __init__(self, error: TransferFailed | None = None) -> None:
        self._error = error

    def wait(self) -> None:
        """Return at once.

        Raises:
            TransferFailed: it had failed.
        """
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Return True."""
        return True
