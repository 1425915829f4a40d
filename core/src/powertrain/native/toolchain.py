"""What builds: the compiler and ninja, and what of this machine goes into a build's key."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import attrs

from powertrain.environment import setting
from powertrain.errors import CompilerMissing

COMPILERS = ("c++", "g++", "clang++")


@attrs.frozen
class Toolchain:
    """A C++ compiler and ninja.

    Attributes:
        compiler: its path.
        version: the first line of what it says of itself.
        ninja: the path of ninja.
    """

    compiler: str
    version: str
    ninja: str


def toolchain() -> Toolchain:
    """Return the compiler that ``CXX`` names, or the first of the usual ones, and ninja.

    Raises:
        CompilerMissing: there is no compiler, no ninja, or no Python header to compile against.
    """
    asked = setting("CXX")
    found = shutil.which(asked) if asked else next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise CompilerMissing(
            f"CXX names no compiler: {asked}" if asked else "there is no C++ compiler",
            where="CXX" if asked else "PATH",
            expected="one of " + ", ".join(COMPILERS),
        )
    answer = subprocess.run([found, "--version"], capture_output=True, text=True, check=False, timeout=30)
    version = (answer.stdout or answer.stderr).partition("\n")[0].strip()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.exists():
        raise CompilerMissing(
            "Python's headers are not installed",
            where=str(headers.parent),
            remedy="install them (Debian and Ubuntu: python3-dev; Fedora: python3-devel)",
        )
    return Toolchain(found, version, _ninja())


def _ninja() -> str:
    if find_spec("ninja") is not None:
        import ninja

        packaged = shutil.which("ninja", path=ninja.BIN_DIR)
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
