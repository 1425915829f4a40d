"""What this machine cannot carry is refused before anything is allocated, each in words of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import powertrain
from powertrain.errors import (
    EngineUnavailable,
    HostMemoryShort,
    PowertrainError,
    StorageFull,
    StorageUnfit,
    StorageUnwritable,
)
from powertrain.hookspecs import hookimpl
from powertrain.plugin import NoConfig, Phase, Plugin
from powertrain_offload import preflight
from powertrain_offload.io import kinds


class Spy(Plugin[NoConfig]):
    """Notes how far an engine came."""

    name, api, phase = "spy", 1, Phase.RECOMPUTE

    def __init__(self) -> None:
        super().__init__(NoConfig())
        self.seen: list[str] = []

    @hookimpl
    def transform_model(self, model: torch.nn.Module) -> None:
        self.seen.append("transform_model")

    @hookimpl
    def wrap_optimizer(self, model: torch.nn.Module) -> None:
        self.seen.append("wrap_optimizer")


def refused(kind: type[PowertrainError], **table: Any) -> PowertrainError:
    """Initialize a deferred model with a table that is refused; return the error."""
    with powertrain.deferred():
        model = torch.nn.Linear(1000, 1000)
    spy = Spy()
    config = {"zero": {"stage": 3}, "offload": table}
    with pytest.raises(PowertrainError) as caught:
        powertrain.initialize(model, config, loss_fn=torch.nn.functional.mse_loss, plugins=[spy])
    assert type(caught.value) is kind, caught.value
    assert all(param.is_meta for param in model.parameters()), "the model got memory"
    assert spy.seen == []
    assert str(caught.value).count("\n") >= 3
    return caught.value


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    error = refused(StorageUnwritable, optimizer="nvme", path=str(tmp_path / "missing"))
    assert error.found == "no such directory"
    assert f"mkdir -p {tmp_path}/missing" in error.remedy
    assert str(tmp_path / "missing") in str(error.where)
    assert not list(tmp_path.iterdir())


def test_one_of_several_directories_is_not_there(tmp_path: Path) -> None:
    error = refused(StorageUnwritable, optimizer="nvme", path=[str(tmp_path), str(tmp_path / "second")])
    assert "second" in str(error.where)


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = refused(StorageUnwritable, parameters="nvme", path=str(tmp_path / "file"))
    assert error.found == "it is no directory"


def test_a_directory_that_this_user_may_not_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the system's answer is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    error = refused(StorageUnwritable, gradients="nvme", path=str(tmp_path))
    assert error.found == "this user may not write there"


def test_a_file_system_that_says_it_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)

    class ReadOnly:
        f_flag = real.f_flag | os.ST_RDONLY

    monkeypatch.setattr(os, "statvfs", lambda path: ReadOnly())
    error = refused(StorageUnwritable, optimizer="nvme", path=str(tmp_path))
    assert error.found == "its file system is mounted read-only"


CHECK = """
import sys
from pathlib import Path
from powertrain_offload import preflight
preflight.check_paths([Path(sys.argv[1])])
"""


def mounted(mount: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Check a directory in which something is mounted, in a space of mounts of its own."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("mounting needs root; the tests beside this one replace the system's answer")
    script = f'set -e; {mount}; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", CHECK, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"mounting is refused here: {done.stderr.strip()}; the tests beside this one replace its answer")
    return done


def test_a_directory_that_is_mounted_read_only(tmp_path: Path) -> None:
    done = mounted(f"mount --bind '{tmp_path}' '{tmp_path}'; mount -o remount,bind,ro '{tmp_path}'", tmp_path)
    assert "its file system is mounted read-only" in done.stderr


def test_a_mount_of_memory_below_a_disk(tmp_path: Path) -> None:
    """The file system that counts is the one that is mounted nearest to the path."""
    place = tmp_path / "a b" / "é"
    place.mkdir(parents=True)
    assert preflight.file_system(place) not in preflight.MEMORY
    done = mounted(f"mount -t tmpfs memory '{place}'", place)
    assert "memory (tmpfs)" in done.stderr


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm; the next test replaces the kind that is found")
def test_a_directory_in_memory() -> None:
    error = refused(StorageUnfit, optimizer="nvme", path="/dev/shm")
    assert error.found == "tmpfs"
    assert "frees none" in error.message


@pytest.mark.parametrize("kind", preflight.MEMORY)
def test_every_kind_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(preflight, "file_system", lambda path: kind)
    assert refused(StorageUnfit, optimizer="nvme", path=str(tmp_path)).found == kind


def test_less_disk_than_is_certain_to_be_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,001,000 parameters, gradients and parameters in 32 bits are certain: 8.008 MB."""
    monkeypatch.setattr(preflight, "free_bytes", lambda path: 7_000_000)
    table = {"optimizer": "nvme", "gradients": "nvme", "parameters": "nvme", "path": str(tmp_path)}
    error = refused(StorageFull, **table)
    assert error.expected == "8.0 MB free: 8.0 MB for each of 1 rank"
    assert error.found == "7.0 MB free"
    monkeypatch.setattr(preflight, "free_bytes", lambda path: 9_000_000)
    with pytest.raises(
        StorageFull, match=r"room for (gradients|parameters|masters)"
    ):  # what the optimizer keeps is known later
        powertrain.initialize(torch.nn.Linear(1000, 1000), {"zero": {"stage": 3}, "offload": table})


@pytest.mark.parametrize(
    ("ranks", "paths", "expected"), [(1, 1, "3.00"), (4, 1, "12.00"), (4, 2, "12.00"), (1, 3, "3.00")]
)
def test_disk_space_by_ranks_and_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, paths: int, expected: str
) -> None:
    """Directories of one disk share its free space; all ranks of the host need theirs."""
    places = [tmp_path / str(number) for number in range(paths)]
    for place in places:
        place.mkdir()
    monkeypatch.setattr(preflight, "free_bytes", lambda path: 2_900_000_000)
    with pytest.raises(StorageFull) as caught:
        preflight.check_space(places, 3_000_000_000, ranks, "the state")
    told = str(caught.value)
    assert f"{expected} GB free: 3.00 GB for each of {ranks} rank{'s' if ranks > 1 else ''}" in told
    assert (f"over {paths} directories" in told) == (paths > 1)
    assert "2.90 GB free" in told
    assert all(str(place) in told for place in places)
    monkeypatch.setattr(preflight, "free_bytes", lambda path: 12_000_000_100)
    preflight.check_space(places, 3_000_000_000, ranks, "the state")


def test_disks_are_counted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two disks, each needs half of the bytes; the smaller one is named."""
    places = [tmp_path / "a", tmp_path / "b"]

    class Found:
        def __init__(self, path: Path) -> None:
            self.st_dev = places.index(path)

    monkeypatch.setattr(Path, "stat", lambda path: Found(path))
    free = {places[0]: 1_000_000_000, places[1]: 600_000_000}
    monkeypatch.setattr(preflight, "free_bytes", free.__getitem__)
    preflight.check_space(places, 1_200_000_000, 1, "the state")
    with pytest.raises(StorageFull) as caught:
        preflight.check_space(places, 1_400_000_000, 1, "the state")
    assert caught.value.where == f"offload.path = {str(places[1])!r}"
    assert caught.value.found == "0.60 GB free"


def test_an_engine_that_does_not_work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = kinds._make
    monkeypatch.setattr(kinds, "_make", lambda kind, settings: "no ring" if kind == "uring" else make(kind, settings))
    error = refused(EngineUnavailable, optimizer="nvme", path=str(tmp_path), engine="uring")
    assert "'uring' does not work here" in error.message
    assert error.found == "no ring"
    assert not list(tmp_path.iterdir())


def test_less_memory_than_transfers_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda: 1_000_000)
    error = refused(HostMemoryShort, parameters="nvme", path=str(tmp_path))
    assert "transfers need" in error.message
    assert error.found == "1.0 MB available"
    assert not list(tmp_path.iterdir())


def test_memory_that_must_be_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda: 7_000_000_000)
    preflight.check_memory(3_500_000_000, 2, "the state")
    with pytest.raises(HostMemoryShort) as caught:
        preflight.check_memory(3_600_000_000, 2, "the state", pinned=True)
    assert "memory to page-lock" in caught.value.message
    assert caught.value.expected == "7.20 GB: 3.60 GB for each of 2 ranks"
    assert caught.value.found == "7.00 GB available"
    monkeypatch.setattr(preflight, "available_memory", lambda: None)  # a system that does not tell
    preflight.check_memory(10**18, 2, "the state")


# --- what the system tells, read from files -----------------------------------------------------


def system(
    root: Path, *, free: int | None = None, group: str = "0::/", limits: dict[str, tuple[str, int]] | None = None
) -> str:
    """Write what Linux tells of memory, and of the limits of control groups (maximum and usage, by path)."""
    (root / "proc/self").mkdir(parents=True)
    if free is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {free // 1024} kB\nBuffers: 1 kB\n")
    (root / "proc/self/cgroup").write_text(group + "\n")
    for name, (limit, used) in (limits or {}).items():
        place = root / "sys/fs/cgroup" / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{used}\n")
    return str(root)


def test_memory_without_a_limit(tmp_path: Path) -> None:
    assert preflight.available_memory(system(tmp_path, free=8 << 30)) == 8 << 30


def test_memory_of_a_control_group(tmp_path: Path) -> None:
    limits = {"pod/run": (str(6 << 30), 1 << 30), "pod": ("max", 5), "": (str(40 << 30), 0)}
    assert preflight.available_memory(system(tmp_path, free=8 << 30, group="0::/pod/run", limits=limits)) == 5 << 30


def test_memory_of_a_group_above(tmp_path: Path) -> None:
    limits = {"pod/run": ("max", 0), "pod": (str(3 << 30), 1 << 30)}
    root = system(tmp_path, free=8 << 30, group="12:cpu:/other\n0::/pod/run", limits=limits)
    assert preflight.available_memory(root) == 2 << 30


def test_a_group_over_its_limit_has_nothing(tmp_path: Path) -> None:
    limits = {"run": (str(1 << 30), 2 << 30)}
    assert preflight.available_memory(system(tmp_path, free=8 << 30, group="0::/run", limits=limits)) == 0


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert preflight.available_memory(str(tmp_path)) is None
    assert preflight.file_system(tmp_path, str(tmp_path / "missing")) is None


def test_the_file_system_of_a_path(tmp_path: Path) -> None:
    """The longest mount point counts, of equals the last; blanks and other letters are read as they are written."""
    (tmp_path / "a b").mkdir()
    (tmp_path / "é").mkdir()
    (tmp_path / "lien").symlink_to(tmp_path / "é")
    real = os.path.realpath(tmp_path)
    table = tmp_path / "mountinfo"
    blank = f"{real}/a b".replace(" ", "\\040")
    table.write_text(
        "20 1 8:1 / / rw - ext4 /dev/root rw\n"
        f"21 20 0:1 / {blank} rw shared:3 - xfs /dev/b rw\n"
        f"22 20 0:2 / {real}/é rw - ext3 /dev/c rw\n"
        f"23 20 0:2 / {real}/é rw - tmpfs none rw\n",
        encoding="utf-8",
    )
    found = [preflight.file_system(tmp_path / name, str(table)) for name in ("", "a b", "a b c", "é", "lien")]
    assert found == ["ext4", "xfs", "ext4", "tmpfs", "tmpfs"]
