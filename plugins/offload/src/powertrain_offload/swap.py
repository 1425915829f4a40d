"""One rank's file of state that rests on disks: nobody else sees it, and it ends with the process.

The file loses its name as soon as it is open, so its space is free again when the process ends, by whatever signal.
Between making it and taking its name away, under a lock, a process may be killed: what is left then is empty, and
removed by the next run.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from powertrain.errors import StorageFull
from powertrain.roles.files import FileEngine, RandomFile, Transfer
from powertrain_offload.preflight import free_bytes

_log = logging.getLogger("powertrain.offload")

_NAME = re.compile(r"powertrain-swap-(?P<host>[\w.-]+)-(?P<id>[0-9a-f]{32})")

PAGE = 4096
"""Bytes: what is set aside starts and ends at multiples of it."""

_STEP = 64 * 2**20
"""Bytes by which the file grows at least."""


class SwapFile:
    """Space on disks, set aside piece by piece; several threads may ask for it.

    Attributes:
        bytes_read, bytes_written: so far.

    Args:
        engine: moves the bytes.
        directories: on different disks, which share the bytes.

    Raises:
        StorageUnwritable: a file cannot be made there.
    """

    def __init__(self, engine: FileEngine, directories: Sequence[Path]) -> None:
        self.directories = list(directories)
        paths = [directory / f"powertrain-swap-{_host()}-{uuid.uuid4().hex}" for directory in directories]
        with contextlib.ExitStack() as stack:
            for directory in sorted(set(directories)):  # in one order: ranks of a host may list them in several
                if stack.enter_context(_locked(directory)):
                    sweep(directory)
            self.file: RandomFile = engine.open(paths, "create")
            for path in paths:
                path.unlink()
        self.bytes_read = self.bytes_written = 0
        self._end = 0
        self._size = 0
        self._gaps: dict[int, int] = {}  # free space by its start
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that are set aside."""
        return self._end - sum(self._gaps.values())

    def allocate(self, nbytes: int, label: str) -> int:
        """Set space aside; return where it starts.

        Raises:
            StorageFull: the disks have less, with the numbers.
        """
        with self._lock:
            return self._allocate(_pages(nbytes), label)

    def _allocate(self, size: int, label: str) -> int:
        for start, length in sorted(self._gaps.items(), key=lambda gap: gap[1]):
            if length >= size:
                del self._gaps[start]
                if length > size:
                    self._gaps[start + size] = length - size
                return start
        start = self._end
        if start + size > self._size:
            self._grow(start + size, label)
        self._end = start + size
        return start

    def free(self, start: int, nbytes: int) -> None:
        """Give space back."""
        with self._lock:
            self._free(start, _pages(nbytes))

    def _free(self, start: int, size: int) -> None:
        if not size:
            return
        for other, length in list(self._gaps.items()):
            if other + length == start:
                start, size = other, size + self._gaps.pop(other)
            elif start + size == other:
                size += self._gaps.pop(other)
        if start + size == self._end:
            self._end = start
        else:
            self._gaps[start] = size

    def read(self, offset: int, into: memoryview) -> Transfer:
        """Start to read."""
        self.bytes_read += len(into)
        return self.file.read(offset, into)

    def write(self, offset: int, data: memoryview) -> Transfer:
        """Start to write."""
        self.bytes_written += len(data)
        return self.file.write(offset, data)

    def close(self) -> None:
        """Give all of it back."""
        self.file.close()

    def _grow(self, least: int, label: str) -> None:
        wanted = max(least, self._size + _STEP)
        try:
            self.file.resize(wanted)
        except StorageFull:
            wanted = least
            try:
                self.file.resize(wanted)
            except StorageFull as error:
                raise StorageFull(
                    f"there is no room for {label}",
                    where=", ".join(map(str, self.directories)),
                    expected=f"{least - self._size:,} bytes more, beside {self._size:,} that this rank has there",
                    found="; ".join(f"{free_bytes(path):,} bytes free" for path in self.directories),
                    remedy="free space, name a larger disk in offload.path, or let less rest there",
                ) from error
        self._size = wanted


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Be the only one on this host that makes or removes our files in a directory; False: it cannot be locked."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def sweep(directory: Path) -> None:
    """Remove what killed processes of this host have left in a directory that is locked.

    Whoever lives has such a file only while it holds the lock.
    """
    for path in list(directory.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and match["host"] == _host():
            with contextlib.suppress(OSError):
                path.unlink()
                _log.info("removed %s, which a killed run has left", path)


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _host() -> str:
    return re.sub(r"[^\w.-]", "-", socket.gethostname()) or "host"
