"""The C++ of the file engines, as ``powertrain.native`` builds it."""

from __future__ import annotations

from pathlib import Path

from powertrain import native

SOURCE = native.Source(
    "powertrain_file_engines",
    Path(__file__).parent / "cpp",
    (native.Unit("module.cpp", ("-O1",)),),  # all that takes time is the kernel's
    ("uring", "direct"),
)
"""What is built: see ``cpp/piece.h`` and ``cpp/engine.h``."""
