"""One build: beside the cache, then renamed into it, by one process at a time."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import attrs

from powertrain.environment import build_limit
from powertrain.errors import BuildFailed
from powertrain.native import cache
from powertrain.native.source import FLAGS, INCLUDE, Source
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
    """

    path: Path
    key: str
    seconds: float
    compiler: str


def find(source: Source) -> Built | None:
    """Return the module built from ``source`` as it stands, or None if there is none yet.

    Raises:
        CompilerMissing: without a compiler nothing can tell which build would be right.
    """
    return _find(source, cache.key(source, toolchain()))


def _find(source: Source, key: str) -> Built | None:
    home = _home(source, key)
    try:
        record = json.loads((home / RECORD).read_text(encoding="utf-8"))
        built = Built(home / record["file"], key, float(record["seconds"]), str(record["compiler"]))
    except (OSError, ValueError, KeyError):
        return None
    return built if built.path.exists() else None


def _home(source: Source, key: str) -> Path:
    return cache.directory() / f"{source.name}-{key}"


def build(source: Source, *, again: bool = False) -> Built:
    """Return the module of ``source``, building it if it is not in the cache.

    Any number of processes may ask at once: one builds, the others wait for it,
    at most ``POWERTRAIN_BUILD_TIMEOUT`` seconds. A build that is killed leaves
    nothing that another would trip over.

    Args:
        source: what to build.
        again: build even if it is there.

    Raises:
        CompilerMissing: no compiler, no ninja or no Python headers.
        BuildFailed: the compiler refused, the cache cannot be written, or another process takes too long.
    """
    tools = toolchain()
    key = cache.key(source, tools)
    if not again and (found := _find(source, key)) is not None:
        return found
    root = cache.directory()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with cache.lock(root / f"{source.name}-{key}.lock", build_limit()):
            if not again and (found := _find(source, key)) is not None:
                return found
            return _build(source, key, tools, root)
    except OSError as error:
        raise _unwritable(source, root, error) from error


def _build(source: Source, key: str, tools: Toolchain, root: Path) -> Built:
    prefix = f".building-{source.name}-{key}-"
    for left in root.glob(f"{prefix}*"):  # of a process that was killed: the lock is ours now
        shutil.rmtree(left, ignore_errors=True)
    _log.info("building %s with %s (once on this machine)", source.name, tools.version)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    try:
        started = time.monotonic()
        name = source.name + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
        (aside / "build.ninja").write_text(_plan(source, tools, name), encoding="utf-8")
        _run(source, tools, aside)
        seconds = time.monotonic() - started
        record = {"file": name, "seconds": round(seconds, 2), "compiler": tools.version}
        (aside / RECORD).write_text(json.dumps(record), encoding="utf-8")
        for waste in (*aside.glob("*.o"), *aside.glob(".ninja*")):
            waste.unlink()
        home = _home(source, key)
        shutil.rmtree(home, ignore_errors=True)
        aside.rename(home)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _log.info("built %s in %.1f s", source.name, seconds)
    return Built(home / name, key, seconds, tools.version)


def _plan(source: Source, tools: Toolchain, name: str) -> str:
    """Return the text of build.ninja."""
    import pybind11

    includes = (INCLUDE, source.directory, pybind11.get_include(), sysconfig.get_path("include"))
    search = " ".join(_quoted(f"-I{path}") for path in includes)
    compiler = _quoted(tools.compiler)
    libraries = " ".join(f"-l{library}" for library in source.libraries)
    lines = [
        "rule compile",
        f"  command = {compiler} {' '.join(FLAGS)} {search} $flags -c $in -o $out",
        "  description = $in",
        "rule link",
        f"  command = {compiler} -shared -pthread $in -o $out {libraries}",
        f"  description = {name}",
    ]
    for unit in source.units:
        file = re.sub(r"([$ :])", r"$\1", str(source.directory / unit.file))
        lines += [f"build {unit.name}.o: compile {file}", f"  flags = {' '.join(unit.flags)}"]
    lines.append(f"build {name}: link {' '.join(f'{unit.name}.o' for unit in source.units)}")
    return "\n".join(lines) + "\n"


def _quoted(argument: str) -> str:
    """Return an argument as the shell reads it, within ninja's file."""
    return shlex.quote(argument).replace("$", "$$")


def _run(source: Source, tools: Toolchain, aside: Path) -> None:
    """Run ninja in ``aside``; what it prints is in the error if it fails."""
    process = subprocess.Popen(
        [tools.ninja, "-C", str(aside)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=build_limit())
    except subprocess.TimeoutExpired:
        raise BuildFailed(f"{source.name} was not built within {build_limit():.0f} s") from None
    finally:
        if process.poll() is None:  # a time limit, or Ctrl-C
            process.terminate()
            process.wait()
    if process.returncode:
        errors = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()[-5:]
        raise BuildFailed(f"{source.name} does not compile", where=tools.version, found="\n".join(errors[:8]))


def _unwritable(source: Source, root: Path, error: OSError) -> BuildFailed:
    full = error.errno == errno.ENOSPC
    return BuildFailed(
        f"{source.name} cannot be built: " + ("the disk is full" if full else "its cache cannot be written"),
        where=str(error.filename or root),
        found=os.strerror(error.errno) if error.errno else str(error),
        remedy=("make room there, or " if full else "") + "set POWERTRAIN_CACHE to a directory that can be written",
    )
