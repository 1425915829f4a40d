"""One file on one disk: opening it twice, for direct and for buffered transfers, and its size."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import attrs

from powertrain.errors import StorageFull, StorageUnwritable

Mode = Literal["create", "read", "update"]
Alignment = Callable[[int, int], tuple[int, int]]
"""Tells a descriptor's alignment of memory and of offsets, zeros for no direct way; takes what to say otherwise."""

UNKNOWN = 4096
"""The alignment, in bytes, that is right for all disks, where the kernel does not tell a file's own."""

_FLAGS = {"create": os.O_RDWR | os.O_CREAT | os.O_EXCL, "read": os.O_RDONLY, "update": os.O_RDWR}
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ESPIPE)


@attrs.define
class Part:
    """An open file.

    Attributes:
        path: of it.
        buffered: the descriptor that goes through the page cache.
        direct: the one that goes past it; -1 where there is none.
        edge: bytes of which a direct transfer's offset and length are multiples.
        memory: bytes of which its address is a multiple.
        why_buffered: why there is no direct one; empty where there is.
    """

    path: str
    buffered: int
    direct: int = -1
    edge: int = UNKNOWN
    memory: int = UNKNOWN
    why_buffered: str = ""

    @classmethod
    def open(cls, path: str, mode: Mode, alignment: Alignment | None) -> Part:
        """Open a file.

        Args:
            path: of it.
            mode: as the engine's ``open`` has it.
            alignment: None: no direct transfers are wanted.

        Raises:
            StorageUnwritable: it cannot be opened.
        """
        try:
            flags = _FLAGS[mode] | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
            part = cls(path, os.open(path, flags, 0o600))
        except OSError as error:
            raise _unopened(path, mode, error) from error
        if alignment is None:
            part.why_buffered = "this engine has no direct transfers"
        else:
            part._open_direct(_FLAGS[mode] & ~(os.O_CREAT | os.O_EXCL), alignment)
        return part

    def _open_direct(self, flags: int, alignment: Alignment) -> None:
        try:
            self.direct = os.open(self.path, flags | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            self.why_buffered = f"its file system refuses O_DIRECT ({os.strerror(error.errno or 0)})"
            return
        self.memory, offset = alignment(self.direct, UNKNOWN)
        if not self.memory or not offset:
            os.close(self.direct)
            self.direct, self.why_buffered = -1, "its file system keeps its files in the page cache"
            return
        # No page may be touched both ways at once, nor a block of the file system (of large blocks, the cache
        # holds whole ones). Some network file systems call a block what they like to send.
        block = min(os.fstatvfs(self.buffered).f_bsize, 1 << 16)
        self.edge = max(offset, mmap.PAGESIZE, block)
        # Nothing must be read ahead into the cache: it would be stale after the next direct write.
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.buffered, 0, 0, os.POSIX_FADV_RANDOM)

    @property
    def size(self) -> int:
        """In bytes."""
        found = os.fstat(self.buffered)
        if stat.S_ISREG(found.st_mode):
            return found.st_size
        try:
            return os.lseek(self.buffered, 0, os.SEEK_END)  # a disk
        except OSError:
            return 0

    def resize(self, size: int) -> None:
        """Make it ``size`` bytes long; what is new is set aside where the file system can.

        Raises:
            StorageFull: there is less space; the file is as it was.
            StorageUnwritable: the system refuses.
        """
        before = self.size
        try:
            if size <= before:
                os.ftruncate(self.buffered, size)
                return
            free = self.free()
            if free is not None and size - before > free:
                raise self._full(size - before, free)
            code = _fallocate(self.buffered, before, size - before)
            if code in _NO_FALLOCATE:
                os.ftruncate(self.buffered, size)
            elif code:
                os.ftruncate(self.buffered, before)
                raise OSError(code, os.strerror(code))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full(size - before, self.free()) from error
            raise StorageUnwritable(
                f"{self.path} cannot be made {size} bytes long: {error.strerror}",
                where=self.path,
                expected=f"a file of {size} bytes",
                found=f"{before} bytes; {errno.errorcode.get(error.errno or 0, 'unknown')}",
                remedy="see the limit on file sizes (`ulimit -f`), the mode it was opened in, and the file system",
            ) from error

    def free(self) -> int | None:
        """Return the bytes that this user may still write to its file system; None where nobody says."""
        if not hasattr(os, "fstatvfs"):
            return None
        found = os.fstatvfs(self.buffered)
        return found.f_bavail * found.f_frsize if found.f_blocks else None

    def _full(self, wanted: int, free: int | None) -> StorageFull:
        return StorageFull(
            f"there is no room for {self.path}",
            where=str(Path(self.path).parent),
            expected=f"{wanted} bytes ({wanted / 2**30:.1f} GiB) of free space",
            found="less" if free is None else f"{free} bytes ({free / 2**30:.1f} GiB)",
        )

    def sync(self) -> None:
        """Force what was written to the disk."""
        getattr(os, "fdatasync", os.fsync)(self.buffered)

    def close(self) -> None:
        """Close both descriptors; a second call does nothing."""
        descriptors, self.direct, self.buffered = (self.direct, self.buffered), -1, -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


def _fallocate(descriptor: int, offset: int, length: int) -> int:
    """Set space aside; return 0, or the errno.

    (Python's ``posix_fallocate`` writes to every block where the file system cannot do it.)
    """
    try:
        call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    except (OSError, TypeError):  # no such system
        call = None
    if call is None:
        return errno.ENOSYS
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while call(descriptor, 0, offset, length) != 0:
        if (code := ctypes.get_errno()) != errno.EINTR:
            return code
    return 0


def _unopened(path: str, mode: Mode, error: OSError) -> StorageUnwritable:
    remedies = {
        errno.EEXIST: "remove it if nothing needs it, or open it with mode 'update'",
        errno.ENOENT: "check the path" if mode != "create" else "make its directory first",
        errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    }
    return StorageUnwritable(
        f"{path} cannot be opened (mode {mode!r}): {error.strerror}",
        where=path,
        expected="a new file" if mode == "create" else "a file",
        found=errno.errorcode.get(error.errno or 0),
        remedy=remedies.get(error.errno or 0),
    )
