"""One build: beside the cache, then renamed into it, by one process at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

import attrs

from powertrain.environment import build_limit
from powertrain.errors import BuildFailed
from powertrain.native import cache
from powertrain.native.compilation import Progress, compile_in
from powertrain.native.source import Source
from powertrain.native.toolchain import Toolchain, toolchain

_log = logging.getLogger("powertrain.native")

RECORD = "build.json"


@attrs.frozen
class Built:
    """A module in the cache.

    Attributes:
        path: of the shared object.
        key: what tells this build from others of the same source.
        seconds: that the build took.
        compiler: what built it.
        made: when, in nanoseconds; tells a build from the next one of the same key.
    """

    path: Path
    key: str
    seconds: float
    compiler: str
    made: int = 0


def find(source: Source) -> Built | None:
    """Return the module built from ``source`` as it stands, or None if there is none yet, or it is damaged.

    Raises:
        CompilerMissing: without a compiler nothing can tell which build would be right.
    """
    return _find(source, cache.key(source, toolchain()))


def _find(source: Source, key: str) -> Built | None:
    home = _home(source, key)
    try:
        record = json.loads((home / RECORD).read_text(encoding="utf-8"))
        path = home / record["file"]
        # A file that was cut short would end the process that loads it with SIGBUS.
        if _digest(path) != record["digest"]:
            return None
        return Built(path, key, float(record["seconds"]), str(record["compiler"]), int(record["made"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _home(source: Source, key: str) -> Path:
    return cache.directory() / f"{source.name}-{key}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build(
    source: Source, *, again: bool = False, broken: Built | None = None, progress: Progress | None = None
) -> Built:
    """Return the module of ``source``, building it if it is not in the cache.

    Any number of processes may ask at once: one builds, the others wait for it,
    at most ``POWERTRAIN_BUILD_TIMEOUT`` seconds. A build that is killed leaves
    nothing that another would trip over.

    Args:
        source: what to build.
        again: build even if it is there.
        broken: a build that does not load, to be replaced unless another process has done so.
        progress: gets each line that ninja and the compiler print.

    Raises:
        CompilerMissing: no compiler, no ninja or no Python headers.
        BuildFailed: the compiler refused, the cache cannot be written, or another process takes too long.
    """
    tools = toolchain()
    key = cache.key(source, tools)

    def there() -> Built | None:
        found = None if again else _find(source, key)
        return None if found is None or (broken is not None and found.made == broken.made) else found

    if (found := there()) is not None:
        return found
    root = cache.directory()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with cache.lock(root / f"{source.name}-{key}.lock", build_limit()) as alone:
            return there() or _build(source, key, tools, root, progress, alone)
    except OSError as error:
        raise _unwritable(source, root, error) from error


def _build(source: Source, key: str, tools: Toolchain, root: Path, progress: Progress | None, alone: bool) -> Built:
    prefix = f".building-{source.name}-{key}-"
    # What a killed process left: the lock is ours now. Without locks it may be another's that is at work.
    for left in root.glob(f"{prefix}*") if alone else ():
        shutil.rmtree(left, ignore_errors=True)
    _log.info("building %s with %s (once on this machine)", source.name, tools.version)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    try:
        started = time.monotonic()
        name = compile_in(aside, source, tools, progress)
        seconds = round(time.monotonic() - started, 2)
        built = Built(_home(source, key) / name, key, seconds, tools.version, time.time_ns())
        record = {"file": name, "digest": _digest(aside / name), "seconds": seconds, "compiler": tools.version}
        (aside / RECORD).write_text(json.dumps({**record, "made": built.made}), encoding="utf-8")
        for waste in (*aside.glob("*.o"), *aside.glob(".ninja*")):
            waste.unlink()
        # Who may read the cache may read this, and not change it.
        aside.chmod(stat.S_IMODE(root.stat().st_mode) & 0o755)
        shutil.rmtree(built.path.parent, ignore_errors=True)
        try:
            aside.rename(built.path.parent)
        except OSError as error:
            # Where there are no locks, another process was as fast.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (other := _find(source, key)):
                raise
            return other
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _log.info("built %s in %.1f s", source.name, seconds)
    return built


def _unwritable(source: Source, root: Path, error: OSError) -> BuildFailed:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return BuildFailed(
        f"{source.name} cannot be built: " + ("the disk is full" if full else "its cache cannot be written"),
        where=str(error.filename or root),
        found=os.strerror(error.errno) if error.errno else str(error),
        remedy=("make room there, or " if full else "") + "set POWERTRAIN_CACHE to a directory that can be written",
    )
