"""Memory that direct transfers like: whole pages, and large ones where there are."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

LARGE = 2 << 20
"""Bytes of a large page, on most systems."""


def buffer(nbytes: int) -> memoryview:
    """Return zeroed, writable memory of ``nbytes`` that starts at a page; its last reference frees it."""
    if nbytes < 0:
        raise ValueError(f"nbytes: expected 0 or more, found {nbytes}")
    if nbytes == 0:
        return memoryview(bytearray())
    large = nbytes >= LARGE and hasattr(mmap, "MADV_HUGEPAGE")
    # A large page lies at a multiple of its size; addresses that are never touched cost nothing.
    size = nbytes + LARGE if large else nbytes
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    pages = mmap.mmap(-1, size, **private)
    start = 0
    if large:
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % LARGE
    return memoryview(pages)[start : start + nbytes]
