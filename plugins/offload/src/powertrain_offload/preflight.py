"""What is checked before anything is allocated, so that a run that cannot work ends in seconds and says why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from powertrain.errors import HostMemoryShort, StorageFull, StorageUnfit, StorageUnwritable

MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
"""File systems that are memory: what rests there takes the very thing that is short."""

_GB = 1e9


def check_paths(paths: Sequence[Path]) -> None:
    """Refuse directories that state cannot rest in.

    Raises:
        StorageUnwritable: one is not there, no directory, or not writable.
        StorageUnfit: one is memory.
    """
    for path in paths:
        _check_writable(path)
        kind = file_system(path)
        if kind in MEMORY:
            raise StorageUnfit(
                f"the directory of offload.path is memory ({kind}): state that rests there frees none",
                where=f"offload.path = {str(path)!r}",
                expected="a directory on a disk",
                found=kind,
            )


def _check_writable(path: Path) -> None:
    if path.is_dir() and os.access(path, os.W_OK | os.X_OK) and not _is_read_only(path):
        return
    remedy = None
    if not path.exists():
        found, remedy = "no such directory", f"mkdir -p {path}, or name another directory"
    elif not path.is_dir():
        found = "it is no directory"
    elif _is_read_only(path):
        found = "its file system is mounted read-only"
    else:
        found = "this user may not write there"
    raise StorageUnwritable(
        "state cannot rest in the directory of offload.path",
        where=f"offload.path = {str(path)!r}",
        expected="a directory that this user may write to",
        found=found,
        remedy=remedy,
    )


def _is_read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & getattr(os, "ST_RDONLY", 1))


def check_space(paths: Sequence[Path], need: int, ranks: int, what: str) -> None:
    """Refuse disks that have less free space than the ranks of this host need.

    Args:
        paths: directories that share the bytes evenly.
        need: bytes of one rank.
        ranks: of this host.
        what: rests there, for people.

    Raises:
        StorageFull: with the numbers.
    """
    share = -(-need * ranks // len(paths))
    by_disk: dict[int, list[Path]] = {}
    for path in paths:
        by_disk.setdefault(path.stat().st_dev, []).append(path)
    for places in by_disk.values():
        free, wanted = free_bytes(places[0]), share * len(places)
        if free < wanted:
            raise StorageFull(
                f"there is no room for {what}",
                where=", ".join(f"offload.path = {str(path)!r}" for path in places),
                expected=f"{_in_gb(wanted)} free: {_in_gb(need)} for each of {ranks} rank{'s' if ranks > 1 else ''}"
                + (f", over {len(paths)} directories" if len(paths) > 1 else ""),
                found=f"{_in_gb(free)} free",
                remedy="free space, name a larger disk in offload.path, or let less rest there",
            )


def check_memory(need: int, ranks: int, what: str, *, pinned: bool = False) -> None:
    """Refuse a host that has less memory than its ranks need.

    Args:
        need: bytes of one rank.
        ranks: of this host.
        what: "gradients need", for people.
        pinned: it must be page-locked, so it cannot be swapped out.

    Raises:
        HostMemoryShort: with the numbers.
    """
    free = available_memory()
    if free is not None and need * ranks > free:
        raise HostMemoryShort(
            f"there is less {'memory to page-lock' if pinned else 'memory'} on this host than {what}",
            where="[offload]",
            expected=f"{_in_gb(need * ranks)}: {_in_gb(need)} for each of {ranks} rank{'s' if ranks > 1 else ''}",
            found=f"{_in_gb(free)} available",
            remedy='let it rest on "nvme", lower offload.buffers or offload.ratio, or use more hosts',
        )


def available_memory(root: str = "/") -> int | None:
    """Return the bytes that this process could still take; None where the system does not tell.

    The smaller of what the host has available and what its control group leaves.
    """
    found = []
    try:
        lines = (Path(root) / "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = (Path(root) / "proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
    except (OSError, ValueError):
        return min(found, default=None)
    place = Path(root) / "sys/fs/cgroup" / group
    for directory in (place, *place.parents):
        try:
            limit = (directory / "memory.max").read_text().strip()
            used = int((directory / "memory.current").read_text())
        except (OSError, ValueError):
            continue
        if limit != "max":
            found.append(max(0, int(limit) - used))
    return min(found, default=None)


def free_bytes(path: Path) -> int:
    """Return what this user may still write at a path."""
    return shutil.disk_usage(path).free


def file_system(path: Path, table: str = "/proc/self/mountinfo") -> str | None:
    """Return the kind of file system that a path lies on; None where the system does not tell (not Linux)."""
    try:
        lines = Path(table).read_text().splitlines()
    except OSError:
        return None
    place = os.path.realpath(path)
    found: tuple[int, str] | None = None
    for line in lines:
        fields, _, rest = line.partition(" - ")
        # Blanks are written as in C (\040); all else is bytes as the file system has them.
        mount = os.fsdecode(fields.split()[4].encode().decode("unicode_escape").encode("latin-1"))
        inside = mount == "/" or place == mount or place.startswith(mount + "/")
        if inside and (found is None or len(mount) >= found[0]):
            found = len(mount), rest.split()[0]
    return None if found is None else found[1]


def _in_gb(nbytes: int) -> str:
    return f"{nbytes / _GB:,.2f} GB" if nbytes >= _GB / 10 else f"{nbytes / 1e6:,.1f} MB"
