"""Memory of the process and of the host, from real and made-up systems."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from powertrain_cpu import memory
from powertrain_cpu.heap import give_back
from powertrain_cpu.memory import ProcessMemory, host_memory

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


def write(file: Path, text: str) -> None:
    """Write a file and the directories above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def status(proc: Path, resident: int, mark: int) -> None:
    """Let the process file system at ``proc`` show these values in kB."""
    write(proc / "self" / "status", f"Name:\tpython\nVmHWM:\t{mark:8} kB\nVmRSS:\t{resident:8} kB\nThreads:\t2\n")


def host(proc: Path, groups: str = "") -> None:
    """Let the host have 1000 kB, 800 kB of it available."""
    write(proc / "meminfo", "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 800 kB\nHugePages_Total: 0\n")
    write(proc / "self" / "cgroup", groups)


@linux
def test_holding_memory_shows_and_the_peak_outlives_it() -> None:
    """64 MiB held raise both figures by about that; released, the peak stays until it is reset."""
    process = ProcessMemory()
    give_back()
    process.reset_peak()
    before, _ = process.read()
    held = torch.ones(16 * MIB)
    during, peak = process.read()
    assert during - before > 60 * MIB
    assert peak >= during - MIB
    del held
    give_back()
    after, still = process.read()
    assert still >= during - MIB
    if after < during - 60 * MIB:  # the allocator may keep the pages
        process.reset_peak()
        assert process.read()[1] < during - 30 * MIB


def test_peak_is_the_kernels_mark(tmp_path: Path) -> None:
    """Before any reset the peak is the high-water mark since the process began."""
    status(tmp_path, 100, 300)
    assert ProcessMemory(tmp_path).read() == (100 * 1024, 300 * 1024)


def test_peak_where_the_mark_cannot_be_reset(tmp_path: Path) -> None:
    """A kernel that keeps its mark: the peak is what was read since, then the mark once it rises."""
    process = ProcessMemory(tmp_path)
    status(tmp_path, 100, 300)
    (tmp_path / "self" / "clear_refs").mkdir()  # writing to it fails
    process.reset_peak()
    assert process.read()[1] == 100 * 1024
    status(tmp_path, 200, 300)
    process.read()
    status(tmp_path, 150, 300)
    assert process.read() == (150 * 1024, 200 * 1024)
    status(tmp_path, 150, 400)
    assert process.read()[1] == 400 * 1024


def test_reset_asks_the_kernel(tmp_path: Path) -> None:
    """The reset writes 5 to clear_refs, as proc(5) says."""
    status(tmp_path, 100, 300)
    ProcessMemory(tmp_path).reset_peak()
    assert (tmp_path / "self" / "clear_refs").read_text() == "5"


def test_without_proc_the_process_mark_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the high-water mark of ``resource`` is both; a system without that module gives 0."""
    pytest.importorskip("resource")
    used, peak = ProcessMemory(tmp_path).read()
    assert used == peak > MIB
    monkeypatch.setitem(sys.modules, "resource", None)
    assert ProcessMemory(tmp_path).read() == (0, 0)


def test_host_without_groups(tmp_path: Path) -> None:
    """Without control groups the host's own figures count."""
    host(tmp_path)
    (tmp_path / "self" / "cgroup").unlink()
    assert host_memory(tmp_path, tmp_path / "none") == (1000 * 1024, 800 * 1024)


def test_version_2_group_limits(tmp_path: Path) -> None:
    """A group's limit replaces the host's size, and page cache it could drop is free."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    host(proc, "0::/job/step\n")
    write(groups / "job" / "step" / "memory.max", "409600\n")
    write(groups / "job" / "step" / "memory.current", "307200\n")
    write(groups / "job" / "step" / "memory.stat", "anon 4096\ninactive_file 102400\n")
    assert host_memory(proc, groups) == (409600, 204800)


def test_a_parent_group_limits_too(tmp_path: Path) -> None:
    """An unlimited group below a limited one has the limited one's memory."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    host(proc, "0::/job/step\n")
    write(groups / "job" / "step" / "memory.max", "max\n")
    write(groups / "job" / "step" / "memory.current", "1024\n")
    write(groups / "job" / "memory.max", "204800\n")
    write(groups / "job" / "memory.current", "204900\n")
    assert host_memory(proc, groups) == (204800, 0)


def test_version_1_group_limits_and_its_absent_limit(tmp_path: Path) -> None:
    """Version 1 writes an enormous number for no limit; the container's mount may hide the group's path."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    host(proc, "5:cpu:/x\n4:memory:/hidden/by/container\n0::/\n")
    write(groups / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(groups / "memory" / "memory.usage_in_bytes", "512000\n")
    assert host_memory(proc, groups) == (1000 * 1024, 800 * 1024)
    write(groups / "memory" / "memory.limit_in_bytes", "614400\n")
    write(groups / "memory" / "memory.stat", "cache 9\ntotal_inactive_file 12000\n")
    assert host_memory(proc, groups) == (614400, 114400)


def test_without_proc_sysconf_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the host's size comes from sysconf, and is 0 where there is none."""
    total, free = host_memory(tmp_path, tmp_path)
    assert total >= free > 0
    monkeypatch.setattr(memory.os, "sysconf_names", {})
    assert host_memory(tmp_path, tmp_path) == (0, 0)
