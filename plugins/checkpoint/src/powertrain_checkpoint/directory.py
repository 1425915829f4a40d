"""What lies in a directory of checkpoints, and the moves that keep it whole.

::

    step-200/                                    complete: it has a manifest
    .step-300.partial-<host>-<id>/               a save under way, locked by its coordinator, or what a dead one left
    .step-100.deleted-<host>-<id>/               being deleted
    .step-300.new-<host>-<id>/                   not locked yet: empty, and there for an instant

Only a rename makes a checkpoint visible, and only a whole one is renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import attrs

from powertrain.errors import CheckpointError, CheckpointMissing, ManifestMissing
from powertrain_checkpoint import manifest
from powertrain_checkpoint.manifest import Manifest

_HIDDEN = re.compile(r"\.(?P<tag>.+)\.(?P<kind>new|partial|deleted)-(?P<host>[\w.-]+)-(?P<id>[0-9a-f]{12})")
_SHARD = "rank-*.safetensors"
_ABANDONED = 24 * 3600.0
"""Seconds without a change after which another host's unfinished save is taken for dead."""


def check_tag(tag: str) -> None:
    """Refuse tags that cannot name a directory.

    Raises:
        CheckpointError: it is empty, hidden, too long, or holds a slash.
    """
    if not tag or tag.startswith(".") or len(tag) > 100 or re.search(r"[/\0]", tag):
        raise CheckpointError(
            f"a checkpoint cannot be tagged {tag!r}",
            expected="a plain file name of at most 100 characters that does not start with a dot",
            remedy="choose another tag",
        )


def complete(root: Path) -> list[str]:
    """Return the tags of complete checkpoints, oldest first."""
    return [tag for _, tag in _found(root)]


def latest(root: Path) -> float:
    """Return when the newest complete checkpoint was made, in seconds since 1970; 0 if there is none."""
    return max((created for created, _ in _found(root)), default=0.0)


def _found(root: Path) -> list[tuple[float, str]]:
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in root.iterdir():
            if not path.name.startswith("."):
                # It may be deleted or renamed while we look.
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    found.append((manifest.created(path), path.name))
    return sorted(found)


def choose(root: Path, tag: str | None) -> str:
    """Return ``tag`` if it names a complete checkpoint, or the newest one for None.

    Raises:
        CheckpointMissing: there is none.
        ManifestMissing: the directory is there, but no manifest in it.
    """
    tags = complete(root)
    if tag is None and tags:
        return tags[-1]
    if tag in tags:
        return tag
    torn = [name for name in _visible(root) if tag == name or (tag is None and any((root / name).glob(_SHARD)))]
    if torn:
        raise ManifestMissing(
            f"{torn[-1]} has no {manifest.FILE_NAME}: its save never finished", where=str(root / torn[-1])
        )
    have = ", ".join(tags[-10:]) or "none"
    raise CheckpointMissing(
        f"no checkpoint {tag!r}" if tag is not None else "no complete checkpoint",
        where=str(root) if root.is_dir() else f"{root}, which does not exist",
        found=f"complete checkpoints: {have}",
    )


def _visible(root: Path) -> list[str]:
    """Return the names of the directories in ``root`` that are not hidden, in order."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return []


class Workplace:
    """A hidden directory that the ranks write one save into.

    The coordinator makes it and holds a lock on it, by which a later save knows
    that its writer is alive.
    """

    def __init__(self, path: Path, lock: int | None = None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make(cls, root: Path, tag: str) -> Workplace:
        """Make and lock one for a save under ``tag``; its identity is the last part of the name."""
        root.mkdir(parents=True, exist_ok=True)
        # It gets its name only once it is locked, so that no sweep takes it for dead.
        identity = _identity()
        path = root / f".{tag}.new-{identity}"
        path.mkdir()
        lock = _lock(path)
        return cls(path.rename(root / f".{tag}.partial-{identity}"), lock)

    @property
    def identity(self) -> str:
        """The save's random name."""
        return self.path.name[-12:]

    def commit(self, target: Path, finished: Manifest) -> None:
        """Write the manifest, last of all, and make the checkpoint visible as ``target``.

        A checkpoint that was there under this tag is complete up to the moment
        at which the new one is.

        Raises:
            OSError: the disk refused.
        """
        names = {file.name for file in finished.files}
        for path in self.path.iterdir():
            if path.name not in names:
                path.unlink()
        if target.is_dir():
            self._replace(target, finished)
        else:
            _write(self.path / manifest.FILE_NAME, finished.to_bytes())
            sync(self.path)
            self.path.rename(target)
        sync(target.parent)

    def _replace(self, target: Path, finished: Manifest) -> None:
        # A directory cannot be renamed over a full one, a file over a file can: the new
        # shards move in beside the old under other names, then the manifest changes hands.
        files = tuple(
            attrs.evolve(file, name=f"{Path(file.name).stem}-{self.identity}.safetensors") for file in finished.files
        )
        for old, new in zip(finished.files, files, strict=True):
            (self.path / old.name).rename(target / new.name)
        sync(target)
        _write(self.path / manifest.FILE_NAME, attrs.evolve(finished, files=files).to_bytes())
        (self.path / manifest.FILE_NAME).replace(target / manifest.FILE_NAME)
        sync(target)
        for path in target.glob(_SHARD):
            if path.name not in {file.name for file in files}:
                path.unlink()
        self.path.rmdir()

    def discard(self) -> None:
        """Remove it: nobody has written anything yet."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Give up the lock: what is left belongs to the next ``sweep``."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sweep(root: Path) -> None:
    """Remove what dead saves and interrupted deletions left in ``root``."""
    with contextlib.suppress(FileNotFoundError):
        for path in list(root.iterdir()):
            match = _HIDDEN.fullmatch(path.name)
            if match and (match["kind"] == "deleted" or _is_dead(path, match["kind"], match["host"])):
                shutil.rmtree(path, ignore_errors=True)


def delete(root: Path, tag: str) -> None:
    """Delete a checkpoint; it vanishes at once, its bytes a moment later."""
    hidden = root / f".{tag}.deleted-{_identity()}"
    (root / tag).rename(hidden)
    shutil.rmtree(hidden)


def sync(directory: Path) -> None:
    """Force a directory's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _identity() -> str:
    return f"{_host()}-{uuid.uuid4().hex[:12]}"


def _host() -> str:
    return re.sub(r"[^\w.-]", "-", socket.gethostname()) or "host"


def _lock(path: Path) -> int | None:
    """Lock a directory; return the descriptor, or None where the file system has no such locks.

    Raises:
        BlockingIOError: somebody holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_dead(path: Path, kind: str, host: str) -> bool:
    """Return whether the save in ``path`` will never finish.

    Locks are trusted on the host that took them; elsewhere, and where there
    are none, only a long silence tells.
    """
    try:
        idle = time.time() - max(entry.stat().st_mtime for entry in _and_inside(path))
        descriptor = _lock(path)
    except (BlockingIOError, FileNotFoundError):
        return False
    if descriptor is not None:
        os.close(descriptor)
        if kind == "partial" and host == _host():
            return True
    return idle > _ABANDONED


def _and_inside(path: Path) -> Iterator[Path]:
    yield path
    yield from path.iterdir()
