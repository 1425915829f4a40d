"""A file and memory to measure with, of which nothing is left, however the measurement ends."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import attrs

from powertrain.errors import StorageFull, StorageUnwritable
from powertrain_offload.io.memory import LARGE, buffer
from powertrain_offload.io.sizes import show_size

ROOM = 128 << 20
"""Bytes of memory that a measurement uses over and over."""

MAP_FIXED = 0x10
MADV_COLLAPSE = 25
"""As Linux numbers them; Python does not name them."""


@attrs.frozen
class Memory:
    """Memory for transfers.

    Attributes:
        view: of it.
        path: by which other programs can map the same; empty where there is no such way.
    """

    view: memoryview
    path: str = ""


@contextlib.contextmanager
def scratch_file(place: str, size: int) -> Iterator[str]:
    """Make a file of ``size`` bytes in a directory, and yield a path that opens it.

    On Linux the file has no name, so that nothing is left even by a process that is killed.

    Raises:
        StorageUnwritable: no directory, or not writable.
        StorageFull: less free space.
    """
    directory = Path(place)
    if not directory.is_dir():
        there = directory.exists()
        raise StorageUnwritable(
            f"{place} is not a directory" if there else f"{place} does not exist",
            where=place,
            expected="a directory on the disk to measure",
            found="a file" if there else "nothing",
            remedy="name its directory" if there else "make it, or name another",
        )
    try:
        descriptor, name = tempfile.mkstemp(prefix=".powertrain-io-bench-", dir=place)
    except OSError as error:
        raise StorageUnwritable(f"{place} cannot be written to: {error.strerror}", where=place) from error
    nameless = sys.platform.startswith("linux")
    try:
        if nameless:
            os.unlink(name)  # noqa: PTH108 (beside the descriptor)
        if hasattr(os, "fstatvfs"):
            found = os.fstatvfs(descriptor)
            free = found.f_bavail * found.f_frsize
            if found.f_blocks and free < size:
                raise StorageFull(
                    f"there is no room for a file of {show_size(size)}",
                    where=place,
                    expected=f"{size} bytes ({show_size(size)}) of free space",
                    found=f"{free} bytes ({show_size(free)})",
                    remedy="free space, or measure with less: --size 256MiB",
                )
        yield f"/proc/{os.getpid()}/fd/{descriptor}" if nameless else name
    finally:
        os.close(descriptor)
        if not nameless:
            with contextlib.suppress(OSError):
                os.unlink(name)  # noqa: PTH108


@contextlib.contextmanager
def scratch_memory() -> Iterator[Memory]:
    """Yield ``ROOM`` bytes that other programs can map as well; no path where there is no such way.

    What is compared must use the same memory, and it must be of large pages, as an engine's ``buffer`` is: on a
    virtual machine small pages may be several times as slow, for the host finds them one by one.
    """
    if not hasattr(os, "memfd_create"):
        yield _filled(buffer(ROOM))
        return
    descriptor = os.memfd_create("powertrain-io-bench", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, ROOM)
        view = _large(descriptor)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        yield _filled(buffer(ROOM)) if view is None else _filled(view, path)
    finally:
        os.close(descriptor)


def _large(descriptor: int) -> memoryview | None:
    """Map a file in memory, of ``ROOM`` bytes, with large pages; None where the kernel (before 6.1) cannot."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # Large pages lie at multiples of their size: reserve more than that, and map the file over it. Python's own
    # mapping gives all of it back in the end.
    pages = mmap.mmap(-1, ROOM + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    start = -address % LARGE
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if libc.mmap(address + start, ROOM, access, mmap.MAP_SHARED | MAP_FIXED, descriptor, 0) != address + start:
        return None
    view = memoryview(pages)[start : start + ROOM]
    view[:: mmap.PAGESIZE] = bytes(ROOM // mmap.PAGESIZE)
    return view if libc.madvise(address + start, ROOM, MADV_COLLAPSE) == 0 else None


def _filled(view: memoryview, path: str = "") -> Memory:
    # Disks may pack what repeats; a MiB is more than they look at.
    data = os.urandom(1 << 20)
    for at in range(0, ROOM, len(data)):
        view[at : at + len(data)] = data
    return Memory(view, path)
