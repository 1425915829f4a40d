"""What builds: the compiler and ninja, and what of this machine goes into a build's key."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import attrs

from powertrain.environment import setting
from powertrain.errors import CompilerMissing

COMPILERS = ("c++", "g++", "clang++")
ANSWER = 60.0
"""Seconds in which a compiler says its version, on a busy machine too."""


@attrs.frozen
class Toolchain:
    """A C++ compiler and ninja.

    Attributes:
        compiler: its path, and the arguments that ``CXX`` gives it.
        version: the first line of what it says of itself.
        ninja: the path of ninja.
    """

    compiler: tuple[str, ...]
    version: str
    ninja: str


def toolchain() -> Toolchain:
    """Return the compiler that ``CXX`` names, or the first of the usual ones, and ninja.

    Raises:
        CompilerMissing: there is no compiler, no ninja, or no Python header to compile against.
    """
    compiler, version = _compiler()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.exists():
        raise CompilerMissing(
            "Python's headers are not installed",
            where=str(headers.parent),
            remedy="install them (Debian and Ubuntu: python3-dev; Fedora: python3-devel)",
        )
    return Toolchain(compiler, version, _ninja())


def _compiler() -> tuple[tuple[str, ...], str]:
    """Return the compiler and its version; like make, take ``CXX`` for a command with arguments."""
    asked = setting("CXX")
    try:
        program, *arguments = shlex.split(asked) if asked else [next(filter(shutil.which, COMPILERS))]
        found = shutil.which(program)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)
        answer = subprocess.run(
            [found, *arguments, "--version"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=True, timeout=ANSWER,
        )  # fmt: skip
    except (OSError, ValueError, StopIteration, subprocess.SubprocessError) as error:
        raise CompilerMissing(
            f"CXX names no compiler: {asked}" if asked else "there is no C++ compiler",
            where="CXX" if asked else "PATH",
            expected="one of " + ", ".join(COMPILERS),
            found=str(error) or None,
        ) from error
    return (found, *arguments), (answer.stdout or answer.stderr).partition("\n")[0].strip()


def _ninja() -> str:
    if find_spec("ninja") is not None:
        import ninja

        packaged = shutil.which("ninja", path=getattr(ninja, "BIN_DIR", None))
        if packaged is not None:
            return packaged
    found = shutil.which("ninja")
    if found is None:
        raise CompilerMissing("there is no ninja", where="PATH", remedy="pip install ninja")
    return found


def processor() -> str:
    """Return the machine's architecture and the instruction sets of its processor, as the system names them."""
    features = ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("flags", "features")):
                features = " ".join(sorted(line.partition(":")[2].split()))
                break
    except OSError:
        features = platform.processor()
    return f"{platform.machine()} {features}"


def libc() -> str:
    """Return the C library and its version: what was linked against a newer one does not load with an older."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # only glibc says
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    return ""
