"""One run of ninja: the file that it reads, and what it says."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

from powertrain.environment import build_limit
from powertrain.errors import BuildFailed
from powertrain.native.source import FLAGS, INCLUDE, Source
from powertrain.native.toolchain import Toolchain

PATIENCE = 10.0
"""Seconds in which ninja ends its compilers when it is told to stop."""

Progress = Callable[[str], None]
"""Gets each line that ninja and the compiler print."""


def compile_in(aside: Path, source: Source, tools: Toolchain, progress: Progress | None = None) -> str:
    """Compile and link ``source`` in the directory ``aside``, and return the name of the module's file.

    Raises:
        BuildFailed: the compiler refused, or it took longer than ``POWERTRAIN_BUILD_TIMEOUT``.
        OSError: the disk is full.
    """
    name = source.name + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
    (aside / "build.ninja").write_text(_plan(source, tools, name), encoding="utf-8")
    code, lines = _run([tools.ninja, "-C", str(aside)], source, progress or (lambda _line: None))
    if code and any(os.strerror(errno.ENOSPC) in line for line in lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(aside))
    if code:
        errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)] or lines[-5:]
        raise BuildFailed(f"{source.name} does not compile", where=tools.version, found="\n".join(errors[:8]))
    return name


def _plan(source: Source, tools: Toolchain, name: str) -> str:
    """Return the text of build.ninja."""
    import pybind11

    includes = (INCLUDE, source.directory, pybind11.get_include(), sysconfig.get_path("include"))
    search = " ".join(_quoted(f"-I{path}") for path in includes)
    compiler = " ".join(map(_quoted, tools.compiler))
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


def _run(command: list[str], source: Source, progress: Progress) -> tuple[int, list[str]]:
    """Run ninja; whatever ends the waiting (a time limit, Ctrl-C) ends ninja and its compilers as well."""
    lines: list[str] = []
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            progress(lines[-1])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    limit = build_limit()
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        raise BuildFailed(
            f"{source.name} was not built within {limit:.0f} s",
            remedy="set POWERTRAIN_BUILD_TIMEOUT to more seconds, or see what keeps this machine busy",
        ) from None
    finally:
        _end(process)
        reader.join(PATIENCE)
        if process.stdout is not None and not reader.is_alive():
            process.stdout.close()
    return code, lines


def _end(process: subprocess.Popen[str]) -> None:
    """End ninja if it runs; asked politely, it ends the compilers that it has started."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
