"""Where built modules lie, what tells them apart, and who may build.

A lock is the system's own (``flock``): it ends with the process that holds it,
however that ends. Beside it stands who holds it, for those who wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from powertrain.environment import cache_directory
from powertrain.errors import BuildFailed
from powertrain.native.source import FLAGS, INCLUDE, Source
from powertrain.native.toolchain import Toolchain, libc, processor

_log = logging.getLogger("powertrain.native")

SUFFIXES = (".h", ".hh", ".hpp", ".hxx", ".inc", ".inl", ".ipp", ".tpp", ".c", ".cc", ".cpp", ".cxx")
"""Of files that a unit may include."""

POLL = 0.05
TOLD_AFTER = 3.0
"""Seconds after which a process that waits says for whom."""


def directory() -> Path:
    """Return the directory of built modules."""
    return cache_directory() / "native"


def key(source: Source, tools: Toolchain) -> str:
    """Return what tells one build of ``source`` from another: text, flags, compiler, processor and Python."""
    digest = hashlib.sha256()

    def take(*parts: str | bytes) -> None:
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little") + data)

    take(tools.version, *tools.compiler[1:], processor(), libc())
    take(version("pybind11"), sysconfig.get_config_var("EXT_SUFFIX") or "")
    take(*FLAGS, *source.libraries)
    for unit in source.units:
        take(unit.name, *unit.flags, (source.directory / unit.file).read_bytes())
    for root in (source.directory, INCLUDE):
        for file in sorted(file for file in root.rglob("*") if file.suffix in SUFFIXES):
            take(file.relative_to(root).as_posix(), file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def lock(path: Path, limit: float) -> Iterator[bool]:
    """Hold the lock at ``path``, and yield whether it is held: some file systems have no locks.

    Args:
        path: of a file that is made, and removed at the end.
        limit: seconds to wait.

    Raises:
        BuildFailed: another process held it all that time; says which.
    """
    try:
        import fcntl
    except ImportError:  # no such system: renaming in place is still safe
        yield False
        return
    started = time.monotonic()
    told = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            waited = time.monotonic() - started
            if waited > limit:
                raise BuildFailed(
                    f"another process has been building for {waited:.0f} s",
                    where=str(path),
                    found=_holder(path),
                    remedy="look at what that process does, or end it: its lock ends with it",
                ) from None
            if not told and waited > TOLD_AFTER:
                told = True
                _log.info("waiting for %s to build %s", _holder(path), path.stem)
            time.sleep(POLL)
            continue
        except OSError:  # no locks here (some network file systems)
            os.close(descriptor)
            yield False
            return
        # The one before may have removed the file between our opening and locking it.
        if _is_at(descriptor, path):
            break
        os.close(descriptor)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield True
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
