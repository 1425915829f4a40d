"""Probes of the host: processor, memory, limits, disk, compiler, network; none imports torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from powertrain.cli.launch_plan import cores
from powertrain.cli.probes import Check

GIB = 2**30
MIB = 2**20


def system() -> Iterator[Check]:
    """Platform, cores, memory, limits and shared memory."""
    yield Check("system", "platform", "ok", f"{platform.platform()}, {_processor()}")
    yield Check("system", "cores", "ok", f"{cores()} usable of {os.cpu_count() or '?'}")
    yield _memory()
    yield from _limits()
    yield from _shared_memory(Path("/dev/shm"))


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1) if match else platform.machine()


def _memory() -> Check:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return Check("system", "memory", "ok", "unknown on this platform")
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    free, total = sizes.get("MemAvailable", 0), sizes.get("MemTotal", 0)
    scarce = free < GIB
    found = f"{free / GIB:.1f} GiB available of {total / GIB:.1f} GiB"
    return Check("system", "memory", "warn" if scarce else "ok", found, "end other programs" if scarce else "")


def _limits() -> Iterator[Check]:
    try:
        import resource
    except ImportError:  # Windows has none
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < 4096
    remedy = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}" if few else ""
    yield Check(
        "system", "open files", "warn" if few else "ok", f"limit {_limit(soft)}, at most {_limit(hard)}", remedy
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield Check("system", "locked memory", "ok", f"limit {_limit(locked, MIB)}")


def _limit(value: int, unit: int = 1) -> str:
    if value < 0:
        return "none"
    return str(value) if unit == 1 else f"{value // unit} MiB"


def _shared_memory(directory: Path) -> Iterator[Check]:
    if not directory.is_dir():
        return
    usage = shutil.disk_usage(directory)
    small = usage.free < 512 * MIB
    yield Check(
        "system",
        "shared memory",
        "warn" if small else "ok",
        f"{usage.free / GIB:.2f} GiB free of {usage.total / GIB:.2f} GiB in {directory}",
        "DataLoader workers and other libraries need it (Powertrain's own ranks do not); in a container: docker run "
        "--shm-size=8g (or --ipc=host)"
        if small
        else "",
    )
    left = [path for path in sorted(directory.iterdir()) if _abandoned(path)]
    size = sum(path.stat().st_size for path in left if path.exists())
    yield Check(
        "system",
        "leftovers",
        "warn" if left else "ok",
        f"{len(left)} files of ended processes, {size / MIB:.0f} MiB, in {directory}"
        if left
        else f"none in {directory}",
        "rm " + " ".join(str(path) for path in left[:8]) + (" …" if len(left) > 8 else "") if left else "",
    )


def _abandoned(path: Path) -> bool:
    """Whether ``path`` is named for a process (``torch_PID_…``, ``powertrain-PID-…``) that is gone."""
    match = re.match(r"(?:torch|powertrain)[_-](\d+)[_-]", path.name)
    return bool(match) and Path("/proc").is_dir() and not Path("/proc", str(match and match.group(1))).exists()


def disk(directory: str) -> Iterator[Check]:
    """Free space, and the speed of one 64 MiB file written to the device and read back."""
    free = shutil.disk_usage(directory).free
    little = free < 5 * GIB
    yield Check(
        "disk",
        "free space",
        "warn" if little else "ok",
        f"{free / GIB:.1f} GiB in {directory}",
        "checkpoints need several times the model's size: choose another [run] output" if little else "",
    )
    try:
        # Without a name, so that nothing stays when the probe runs out of time and is killed.
        with tempfile.TemporaryFile(dir=directory) as file:
            write, read = _speeds(file.fileno())
    except OSError as error:
        remedy = "choose another directory: powertrain doctor --directory DIR, [run] output"
        yield Check("disk", "speed", "fail", f"cannot write to {directory}: {error.strerror}", remedy)
        return
    slow = write < 50
    yield Check(
        "disk",
        "speed",
        "warn" if slow else "ok",
        f"{write:.0f} MB/s written and synced, {read:.0f} MB/s read, in {directory}",
        "saves will be slow: choose a local disk for [checkpoint] directory" if slow else "",
    )


def _speeds(descriptor: int) -> tuple[float, float]:
    """Return the speeds of writing with fsync and of reading, in MB/s."""
    block = os.urandom(4 * MIB)
    started = time.perf_counter()
    for _ in range(16):
        os.write(descriptor, block)
    os.fsync(descriptor)
    write = time.perf_counter() - started
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(descriptor, 0, os.SEEK_SET)
    started = time.perf_counter()
    while os.read(descriptor, 4 * MIB):
        pass
    read = time.perf_counter() - started
    megabytes = 64 * MIB / 1e6
    return megabytes / write, megabytes / read


def compiler() -> Iterator[Check]:
    """What builds native kernels on their first use; without it their references are used."""
    names = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if names:
        yield Check("compiler", "c++", "ok", _version_line(names[0]))
    else:
        yield Check("compiler", "c++", "warn", "no C++ compiler found", "apt install g++, for the native kernels")
    # The package's script lies beside the interpreter, which need not be on PATH.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja:
        yield Check("compiler", "ninja", "ok", _version_line(ninja))
    else:
        yield Check("compiler", "ninja", "warn", "not found", "pip install ninja, for the native kernels")
    nvcc = shutil.which("nvcc")
    yield Check("compiler", "nvcc", "ok", _version_line(nvcc) if nvcc else "not found, and not needed")


def _version_line(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=5, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    if done.returncode or not lines:
        return f"{program} --version exited with {done.returncode}"
    return next((line for line in lines if "release" in line), lines[0])


def network() -> Iterator[Check]:
    """Whether ranks can reach one another on this host, and whether its name leads anywhere."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=2).close()
    yield Check("network", "loopback", "ok", "127.0.0.1 accepts connections")
    name = socket.gethostname()
    try:
        yield Check("network", "host name", "ok", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        remedy = f"add {name} to /etc/hosts, or give addresses to --rdzv-endpoint"
        yield Check("network", "host name", "warn", f"{name} does not resolve: {error.strerror}", remedy)
