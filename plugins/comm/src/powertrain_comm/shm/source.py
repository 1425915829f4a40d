"""The C++ of shared memory, as ``powertrain.native`` builds it."""

from __future__ import annotations

from pathlib import Path

from powertrain import native

SOURCE = native.Source(
    "powertrain_shared_memory",
    Path(__file__).parent / "cpp",
    (native.Unit("module.cpp", ("-O1",)), *native.vector_units("work.cpp")),
    ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "receive", "barrier"),
)
"""What is built: see ``cpp/engine.h``."""
