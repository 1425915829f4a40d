"""Fixtures of the tests of kernels: the built module, on each vector path that this processor has."""

from __future__ import annotations

import shutil
from types import ModuleType

import pytest

from powertrain import native
from powertrain_cpu.kernels import PATHS, CpuKernels
from powertrain_cpu.source import SOURCE


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """Return the built kernels; the first test of a machine waits for the build."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler here")
    return native.load(SOURCE)


@pytest.fixture(params=PATHS)
def own(request: pytest.FixtureRequest, module: ModuleType) -> CpuKernels:
    """Return the kernels on one vector path."""
    if PATHS.index(request.param) > module.widest_path():
        pytest.skip(f"this processor has no {request.param}")
    return CpuKernels(module, request.param)
