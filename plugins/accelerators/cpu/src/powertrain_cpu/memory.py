"""The memory of this process and of its host, in bytes, without third-party packages.

Linux tells everything under ``/proc`` and ``/sys/fs/cgroup``. Elsewhere
``resource`` gives the process's high-water mark and ``sysconf`` the host's
size; what a system does not tell is 0.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class ProcessMemory:
    """The resident memory of this process, and its peak since the last reset.

    The kernel's own high-water mark is reset where it allows that (Linux, by
    writing 5 to ``clear_refs``, see ``proc(5)``). Where it does not, the peak
    is the mark once it has risen since the reset, and until then the largest
    value read since.

    Args:
        proc: where the process file system is mounted.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._self = proc / "self"
        self._mark_at_reset = 0
        self._largest_read = 0

    def read(self) -> tuple[int, int]:
        """Return (resident now, peak since the last reset)."""
        used, mark = self._resident()
        self._largest_read = max(self._largest_read, used)
        return used, mark if mark > self._mark_at_reset else self._largest_read

    def reset_peak(self) -> None:
        """Start the peak anew from what is resident now."""
        with suppress(OSError):
            (self._self / "clear_refs").write_text("5")
        self._largest_read, self._mark_at_reset = self._resident()

    def _resident(self) -> tuple[int, int]:
        """Return (resident now, the system's high-water mark)."""
        status = _kilobytes(self._self / "status")
        if "VmRSS" in status:
            return status["VmRSS"], status.get("VmHWM", status["VmRSS"])
        mark = _usage_mark()
        return mark, mark


def host_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> tuple[int, int]:
    """Return (total, free) memory that this process could use.

    The host's, or its control group's where that is less. Memory that the
    kernel would give back (page cache) counts as free.
    """
    info = _kilobytes(proc / "meminfo")
    if "MemTotal" not in info:
        return _sysconf_memory()
    total = info["MemTotal"]
    free = info.get("MemAvailable", info.get("MemFree", 0))
    for limit, used in _group_limits(proc / "self" / "cgroup", cgroups):
        if limit < total:
            total = limit
        free = min(free, max(0, limit - used))
    return total, free


def _group_limits(membership: Path, cgroups: Path) -> list[tuple[int, int]]:
    """Return (limit, used) of this process's control group and each one above it that has a limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":  # the unified hierarchy, version 2
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):  # version 1
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        # Inside a container the path may be the host's; its mount then shows the own group as the root.
        for place in (group, *group.parents):
            limit, used = _number(place / names[0]), _number(place / names[1])
            if limit is not None and used is not None:
                found.append((limit, used - _statistics(place / "memory.stat").get(names[2], 0)))
            if place == root:
                break
    return found


def _number(file: Path) -> int | None:
    """Return the number in a one-line file; None if there is none (version 2 writes ``max`` for no limit)."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistics(file: Path) -> dict[str, int]:
    """Return the ``name number`` lines of a file."""
    try:
        pairs = (line.split() for line in file.read_text().splitlines())
        return {name: int(value) for name, value in pairs}
    except (OSError, ValueError):
        return {}


def _kilobytes(file: Path) -> dict[str, int]:
    """Return the ``Name: number kB`` lines of a file, in bytes."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.replace(":", " ").split() for line in lines)
    return {words[0]: int(words[1]) * 1024 for words in fields if len(words) == 3 and words[2] == "kB"}


def _usage_mark() -> int:
    """Return the process's largest resident memory so far; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _sysconf_memory() -> tuple[int, int]:
    """Return (total, free) from ``sysconf``; 0 for what the system does not tell."""
    names = getattr(os, "sysconf_names", {})
    page = os.sysconf("SC_PAGE_SIZE") if "SC_PAGE_SIZE" in names else 0
    total = os.sysconf("SC_PHYS_PAGES") * page if "SC_PHYS_PAGES" in names else 0
    free = os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in names else 0
    return total, free
