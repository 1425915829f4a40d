"""What is checked before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from powertrain.errors import StorageUnfit, StorageUnwritable

MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
"""File systems that are memory: what rests there takes the very thing that is short."""


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
                where=str(path),
                expected="a directory on a disk",
                found=kind,
            )


def _check_writable(path: Path) -> None:
    if path.is_dir() and os.access(path, os.W_OK | os.X_OK):
        return
    if not path.exists():
        found = "no such directory"
    elif not path.is_dir():
        found = "it is no directory"
    else:
        found = "this user may not write there"
    raise StorageUnwritable(
        "state cannot rest in the directory of offload.path",
        where=str(path),
        expected="a directory that this user may write to",
        found=found,
        remedy=f"mkdir -p {path}, or name another directory" if not path.exists() else None,
    )


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
        mount = fields.split()[4].encode().decode("unicode_escape")
        inside = mount == "/" or place == mount or place.startswith(mount + "/")
        if inside and (found is None or len(mount) >= found[0]):
            found = len(mount), rest.split()[0]
    return None if found is None else found[1]
