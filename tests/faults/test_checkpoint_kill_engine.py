"""kill -9 during saves through an I/O engine: space is set aside, and bytes go past the page cache."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 20


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous", "overwrite"])
def test_the_newest_checkpoint_loads_after_every_kill(tmp_path: Path, mode: str) -> None:
    """As without an engine: after each kill the newest checkpoint loads, is no mixture and newer than before."""
    harness: str = runpy.run_path(str(Path(__file__).with_name("test_checkpoint_kill.py")))["HARNESS"]
    plain = 'return DirectoryStore(root, SingleProcess(Mesh.build(1, 0), torch.device("cpu")))'
    assert plain in harness
    with_engine = plain[:-1] + ', make_engine=lambda: __import__("powertrain_offload.io").io.open_engine())'
    command = [sys.executable, "-c", harness.replace(plain, with_engine), str(tmp_path), str(KILLS), mode, "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
