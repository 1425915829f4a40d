"""The text: the source of Python's standard library, as bytes."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

from powertrain_data.corpus import Corpus, build_bytes


def standard_library(output: Path, progress: Callable[[int, int], None] | None = None) -> Corpus:
    """Build the token files under ``output`` unless they are there; 5 % of the files are for validation.

    Ranks may do so at once: each builds aside, and the first one done wins.
    """
    corpus = Corpus(output / "train.bin", output / "validation.bin")
    if output.exists():
        return corpus
    root = Path(sysconfig.get_path("stdlib"))
    # The library's own tests are most of its bytes and the least like code that people write.
    skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    aside = output.with_name(f"{output.name}.{os.getpid()}")
    try:
        build_bytes(files, aside, root=root, progress=progress)
        aside.rename(output)
    except OSError:
        if not output.exists():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return corpus
