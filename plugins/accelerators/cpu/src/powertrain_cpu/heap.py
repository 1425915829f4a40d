"""How the C library's heap keeps memory that was freed.

Training frees and asks for the same gigabytes every step. By default glibc gives
what lies at the end of its heap back to the system as soon as it is free, and maps
every block over 32 MiB anew (logits are larger, and gradients of embeddings). The
next step pays a page fault, and zeros, for each 4 KiB of it: 7 % of a step of a
small GPT. So freed memory is kept, and given back when somebody asks for that.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping

from powertrain.environment import setting

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of parameters in <malloc.h>."""

KEPT_AT_THE_END = 2**31 - 1
"""Bytes of free memory at the end of the heap from which they are given back: as many as the interface takes."""

ALONE = 0
"""Blocks that are mapped alone, and unmapped when they are freed."""

SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def keep_freed(environ: Mapping[str, str] | None = None) -> bool:
    """Keep freed memory for the next request, unless the user tunes malloc; return whether it is so.

    Does nothing where the C library has no such parameters (musl, macOS).
    """
    if sys.platform != "linux":
        return False
    tuned = any(setting(name, environ) is not None for name in SETTINGS)
    if tuned or "glibc.malloc." in (setting("GLIBC_TUNABLES", environ) or ""):
        return False
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    return option is not None and bool(option(M_TRIM_THRESHOLD, KEPT_AT_THE_END) and option(M_MMAP_MAX, ALONE))


def give_back() -> None:
    """Give free memory back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
