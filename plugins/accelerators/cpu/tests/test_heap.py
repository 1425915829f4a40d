"""Freed memory stays in the process, and goes when it is asked to."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from powertrain_cpu.heap import keep_freed

GLIBC = platform.libc_ver()[0] == "glibc"

CHURN = """
import resource

import torch

from powertrain_cpu.accelerator import CpuAccelerator

accelerator = CpuAccelerator()
device = accelerator.device(0)
accelerator.activate(device)


def step():
    for block in [torch.ones(6 * 2**18) for _ in range(16)]:
        block.add_(1)
    torch.ones(12 * 2**20).add_(1)


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


step()
before = faults()
for _ in range(10):
    step()
after = faults()
held = accelerator.memory(device).used
accelerator.release_unused(device)
print(after - before, held - accelerator.memory(device).used)
"""


def churn() -> tuple[int, int]:
    """Return the page faults of ten rounds of 96 MiB and one block of 48, and the bytes given back after them."""
    done = subprocess.run([sys.executable, "-c", CHURN], capture_output=True, text=True, check=True)
    faults, returned = done.stdout.split()
    return int(faults), int(returned)


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    """After one round, the same blocks cost no page faults; on request the system gets the memory back."""
    faults, returned = churn()
    assert faults < 6_000, "half of the large block: ten rounds touch it and 24,576 pages more ten times"
    assert returned > 80 * 2**20


@pytest.mark.parametrize(
    "environ", [{"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}], ids=str
)
def test_a_users_own_settings_stay(environ: dict[str, str]) -> None:
    """Who tunes malloc by the environment is not overruled."""
    assert not keep_freed(environ)
