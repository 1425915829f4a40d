"""Facts about the processor, from the operating system; imports no torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

NOTABLE = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "sve",
    "sve2",
    "bf16",
    "i8mm",
)
"""The flags that matter to numerical kernels, in Linux's spelling (x86, then Arm)."""


def usable_cores() -> int:
    """Return how many cores this process may run on: its affinity where the system tells, else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def model_name(cpuinfo: Path = CPUINFO) -> str:
    """Return the processor's name as its maker prints it, or its architecture."""
    return _field(cpuinfo, "model name") or platform.processor() or platform.machine() or "unknown"


def instruction_sets(cpuinfo: Path = CPUINFO) -> list[str]:
    """Return the notable instruction sets of the first core; empty where the system does not list them."""
    flags = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split())
    return [name for name in NOTABLE if name in flags]


def _field(cpuinfo: Path, name: str) -> str:
    """Return the first ``name : value`` of a cpuinfo file, or an empty string."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
