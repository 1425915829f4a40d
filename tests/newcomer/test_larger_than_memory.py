"""The second example, small: a model whose state rests on the disk, under a limit of memory that is real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "larger_than_memory" / "train.py"
SMALL = ["--width", "128", "--depth", "2", "--steps", "2", "--losses", "losses.json"]


def run(where: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL, *options], cwd=where, capture_output=True, text=True, timeout=300
    )


@pytest.mark.timeout(600)
def test_the_disk_gives_what_memory_gives(tmp_path):
    """With a limit and without, the losses are equal to the bit, and nothing is left on the disk."""
    limited = run(tmp_path, "--limit", "3")
    assert limited.returncode == 0, limited.stderr
    assert "training state in memory" in limited.stdout
    losses = [float(loss) for loss in re.findall(r"loss (\S+),", limited.stdout)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert list((tmp_path / "runs" / "larger_than_memory").iterdir()) == []
    whole = run(tmp_path, "--in-memory")
    assert whole.returncode == 0, whole.stderr
    assert "the losses are bit-equal to those in losses.json" in whole.stdout


@pytest.mark.timeout(600)
def test_the_limit_is_enforced(tmp_path):
    """A limit below what the libraries need ends the run: it is the system's, not a wish."""
    done = run(tmp_path, "--limit", "0.05")
    assert done.returncode != 0
    assert "step 1" not in done.stdout
