"""Fixtures of the builder's tests: a cache of their own, and processes that load a module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from building import PROGRAM


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test an empty cache, at a path with a space, and the usual compiler; return where modules will lie."""
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "the cache"))
    for name in ("CXX", "POWERTRAIN_NATIVE", "POWERTRAIN_BUILD_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "the cache" / "native"


@pytest.fixture
def start(cache: Path) -> Any:
    """Start a process that loads the tiny module; what is still running at the end is killed."""
    processes = []

    def run(*arguments: object, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()
