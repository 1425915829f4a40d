"""What is built: translation units, and how each is compiled."""

from __future__ import annotations

import platform
from pathlib import Path

import attrs

INCLUDE = Path(__file__).parent / "include"
"""The core's own C++ headers: number formats, threads, vector loops; ``#include <powertrain/…>``."""

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-pthread")
"""Every unit's. None changes a result: infinities, NaN and the order of additions stay as written."""

_X86 = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512",
    ),
}  # fmt: skip


@attrs.frozen
class Unit:
    """One file, compiled once.

    Attributes:
        file: relative to the source's directory.
        flags: beside those of all units.
        name: of the object, unique in the source; by default the file's stem.
    """

    file: str
    flags: tuple[str, ...] = ()
    name: str = attrs.field()

    @name.default
    def _stem(self) -> str:
        return Path(self.file).stem


@attrs.frozen
class Source:
    """What makes one extension module.

    Attributes:
        name: of the module, as ``PYBIND11_MODULE`` says it.
        directory: where its files lie; all headers below it are part of what is built.
        units: what is compiled.
        kernels: what it offers, for people.
        libraries: to link with, without the ``-l``.
    """

    name: str
    directory: Path
    units: tuple[Unit, ...]
    kernels: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


def vector_units(file: str, machine: str | None = None) -> tuple[Unit, ...]:
    """Return ``file`` once for each vector instruction set of this kind of machine.

    Each unit is compiled with ``-DPOWERTRAIN_PATH=<path>``: ``plain`` everywhere, and ``avx2`` and
    ``avx512`` on x86. Which of them may run is found at run time: see ``powertrain/paths.h``.
    """
    machine = (machine or platform.machine()).lower()
    paths: dict[str, tuple[str, ...]] = {"plain": ()}
    if machine in ("x86_64", "amd64"):
        paths.update(_X86)
    stem = Path(file).stem
    return tuple(Unit(file, (*flags, f"-DPOWERTRAIN_PATH={path}"), f"{stem}_{path}") for path, flags in paths.items())
