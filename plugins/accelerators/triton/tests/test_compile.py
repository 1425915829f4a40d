"""Every kernel compiles for GPUs that are not here, and moves 16 bytes at a time (8 on AMD, of 16-bit types)."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TARGETS = {"hopper": ("cuda", "90", "32"), "mi300": ("hip", "gfx942", "64")}
KERNELS = {
    "updates.adam", "updates.lion", "updates.adagrad", "updates.momentum", "lamb.moments", "lamb.apply",
    "sums.squares", "sums.gather", "sums.combine", "blockwise.quantize", "blockwise.dequantize",
    "norms.forward", "norms.backward", "rotary.turn", "swiglu.forward", "swiglu.backward",
    "losses.softmax_cross_entropy",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="there is no triton for this system")
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_to_wide_accesses(target: str, tmp_path: Path) -> None:
    """Machine code comes out, with wide accesses, and with no product fused into a sum of a quantizer."""
    command = [sys.executable, str(Path(__file__).with_name("compiled.py")), *TARGETS[target]]
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == KERNELS
    # Partial sums are few, and read one by one.
    narrow = {name for name, found in report.items() if not all(found["wide"])} - {"sums.gather"}
    assert not narrow, report
    for name in ("blockwise.quantize", "blockwise.dequantize"):
        # On AMD a correctly rounded division is itself made of them.
        assert not any(report[name]["fused"]) or target == "mi300", report[name]
