"""How much of the host's memory may be used for a moment."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_SHARE = 0.5
"""Of what is available: other ranks, and whoever else is on the host, need some at the same moment."""


def spare_memory(ranks: int) -> int:
    """Return the bytes that each of this host's ``ranks`` may take for a moment; 0 where nobody tells."""
    known = [found for found in (_available(), _allowed()) if found is not None]
    return int(max(min(known, default=0), 0) * _SHARE) // max(ranks, 1)


def _available() -> int | None:
    """Return what the system could give without swapping."""
    with contextlib.suppress(OSError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(match[1]) * 1024 if match else None
    return None


def _allowed() -> int | None:
    """Return what this process's control groups leave to it; None where there is no limit."""
    rooms: list[int] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, name = line.split(":", 2)
            if kinds == "":
                rooms += _rooms(Path("/sys/fs/cgroup"), name, "memory.max", "memory.current")
            elif "memory" in kinds.split(","):
                rooms += _rooms(Path("/sys/fs/cgroup/memory"), name, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return min(rooms, default=None)


def _rooms(root: Path, name: str, limit: str, usage: str) -> list[int]:
    """Return the room in a group and in all above it, where they have limits."""
    rooms = []
    group = root / name.lstrip("/")
    for path in [group, *group.parents]:
        with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
            rooms.append(int((path / limit).read_text()) - int((path / usage).read_text()))
        if path == root:
            break
    return rooms
