"""The processor's kernels in C++, as ``powertrain.native`` builds them."""

from __future__ import annotations

from pathlib import Path

from powertrain import native

KERNELS = (
    "adam",
    "lion",
    "adagrad",
    "momentum",
    "lamb_moments",
    "lamb_apply",
    "sums_of_squares",
    "combine",
    "quantize",
    "dequantize",
)
"""What ``kernels.CpuKernels`` has a method for."""

SOURCE = native.Source(
    "powertrain_cpu_kernels",
    Path(__file__).parent / "cpp",
    (native.Unit("module.cpp", ("-O1",)), *native.vector_units("kernels.cpp")),
    KERNELS,
)
"""What is built: see ``cpp/table.h``.

The module's own unit has no loop that counts, and all of pybind11 to compile: hence -O1.
"""
