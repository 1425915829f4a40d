"""C++ that is built on first use: never at import, never at install.

A plugin describes its extension module as a ``Source`` and asks for it with
``load``, which builds it once per machine into a cache, or with ``try_load``,
which answers None where that cannot be done, so that the caller takes its
PyTorch reference. Kernels take raw pointers and sizes, so a built module is
good for every version of torch; pybind11 is all that it is built against.

    SOURCE = Source("powertrain_example", Path(__file__).parent / "cpp", (Unit("module.cpp"),))
    module = native.try_load(SOURCE)
"""

from __future__ import annotations

from powertrain.native.builder import Built, build, find
from powertrain.native.kernel_set import Finding, KernelSet
from powertrain.native.loader import load, try_load
from powertrain.native.source import INCLUDE, Source, Unit, vector_units

__all__ = [
    "INCLUDE",
    "Built",
    "Finding",
    "KernelSet",
    "Source",
    "Unit",
    "build",
    "find",
    "load",
    "try_load",
    "vector_units",
]
