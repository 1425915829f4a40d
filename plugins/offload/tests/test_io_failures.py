"""What a disk refuses, and what a caller gets wrong, is said with the file, the place and the numbers."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from powertrain.errors import StorageFull, StorageUnwritable, TransferFailed
from powertrain_offload import io
from powertrain_offload.io.part import Part


@pytest.fixture(params=io.KINDS)
def engine(request):
    if reason := io.available()[request.param]:
        pytest.skip(reason)
    with io.open_engine(request.param, block=1 << 14, depth=4, threads=3) as engine:
        yield engine


@pytest.mark.parametrize("size", [0, 100, 4096, 100_000, 131_072])
def test_a_file_that_ends_too_early(engine, tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (size // 256) + bytes(size % 256))
    memory = engine.buffer(1 << 20)
    with engine.open(path, "read") as file:
        move = file.read(0, memory)
        with pytest.raises(TransferFailed) as caught:
            move.wait()
    error = caught.value
    assert "the file ended" in error.message
    assert error.where == f"{path}, byte {size}"
    assert (error.expected, error.found) == ("1048576 bytes from byte 0 of the whole", f"{size} bytes before it failed")
    assert "shorter" in error.remedy
    assert memory[:size] == path.read_bytes()


def test_a_file_that_is_cut_while_it_is_open(engine, tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    with engine.open(paths, "create") as file:
        file.resize(4 << 20)
        file.write(0, memoryview(bytes(4 << 20))).wait()
        os.truncate(paths[1], 1 << 20)
        with pytest.raises(TransferFailed) as caught:
            file.read(0, engine.buffer(4 << 20)).wait()
    assert caught.value.where == f"{paths[1]}, byte {1 << 20}"
    assert caught.value.found == f"{3 << 20} bytes before it failed"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk(engine):
    with engine.open("/dev/full", "update") as file:
        move = file.write(8192, memoryview(bytes(100_000)))
        with pytest.raises(TransferFailed, match=r"No space left on device \(ENOSPC\)") as caught:
            move.wait()
        assert caught.value.where == "/dev/full, byte 8192"
        assert "free space" in caught.value.remedy
        move_again = file.write(0, memoryview(bytes(10)))
        with pytest.raises(TransferFailed):
            file.sync()
        assert move_again.done()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file that always fails")
def test_a_broken_disk(engine):
    """No process has memory at address 0, so the kernel answers with an I/O error."""
    with engine.open("/proc/self/mem", "read") as file, pytest.raises(TransferFailed, match="EIO") as caught:
        file.read(0, memoryview(bytearray(64))).wait()
    assert "resume from the last checkpoint" in caught.value.remedy


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from powertrain.errors import StorageUnwritable, TransferFailed
from powertrain_offload import io
with io.open_engine(sys.argv[1], block=1 << 14) as engine, engine.open(sys.argv[2], "create") as file:
    try:
        file.write(0, engine.buffer(1 << 20)).wait()
    except TransferFailed as error:
        print(error.message)
    try:
        file.resize(1 << 20)
    except StorageUnwritable as error:
        print(error.message)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_a_limit_on_the_size_of_files(engine, tmp_path):
    command = [sys.executable, "-c", LIMITED, engine.name, str(tmp_path / "file")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.stderr == ""
    first, second = found.stdout.splitlines()
    assert "File too large (EFBIG)" in first
    assert "cannot be made 1048576 bytes long" in second


def test_more_than_the_disk_has(engine, tmp_path):
    with engine.open([tmp_path / "a", tmp_path / "b"], "create") as file:
        file.resize(1 << 20)
        with pytest.raises(StorageFull) as caught:
            file.resize(1 << 58)
        assert file.size == 1 << 20
    assert f"{(1 << 57) - (1 << 20)} bytes" in caught.value.expected
    assert "GiB" in caught.value.found
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 1 << 20


def test_a_second_disk_that_is_full_leaves_the_first_as_it_was(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(Part, "free", lambda part: 10 if part.path.endswith("b") else 1 << 40)
    with engine.open([tmp_path / "a", tmp_path / "b"], "create") as file:
        with pytest.raises(StorageFull, match="b"):
            file.resize(4 << 20)
        assert file.size == 0
    assert (tmp_path / "a").stat().st_size == 0


def test_a_file_system_that_sets_no_space_aside(engine, tmp_path, monkeypatch):
    import errno

    monkeypatch.setattr("powertrain_offload.io.part._fallocate", lambda *_: errno.EOPNOTSUPP)
    with engine.open(tmp_path / "file", "create") as file:
        file.resize(12_345)
        assert (tmp_path / "file").stat().st_size == 12_345


def test_a_disk_that_fills_up_while_space_is_set_aside(engine, tmp_path, monkeypatch):
    import errno

    monkeypatch.setattr("powertrain_offload.io.part._fallocate", lambda *_: errno.ENOSPC)
    with engine.open(tmp_path / "file", "create") as file, pytest.raises(StorageFull):
        file.resize(12_345)
    assert (tmp_path / "file").stat().st_size == 0


def test_files_that_cannot_be_opened(engine, tmp_path):
    there = tmp_path / "there"
    there.write_bytes(b"1")
    for paths, mode, word in (
        (tmp_path / "not", "read", "No such file"),
        (tmp_path / "not" / "deeper", "create", "No such file"),
        (there, "create", "File exists"),
        (tmp_path, "update", "directory"),
    ):
        with pytest.raises(StorageUnwritable, match=word) as caught:
            engine.open(paths, mode)
        assert str(tmp_path) in caught.value.where
    with pytest.raises(StorageUnwritable):
        engine.open([tmp_path / "new", there], "create")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_arguments_that_mean_nothing(engine, tmp_path):
    with engine.open(tmp_path / "file", "create") as file:
        for call, word in (
            (lambda: file.read(-1, memoryview(bytearray(1))), "offset"),
            (lambda: file.read(0, memoryview(b"fixed")), "writable"),
            (lambda: file.write(0, memoryview(bytes(10))[::2]), "gaps"),
            (lambda: file.resize(-1), "size"),
            (lambda: engine.open([], "read"), "paths"),
            (lambda: engine.open(tmp_path / "x", "append"), "mode"),
            (lambda: engine.open(tmp_path / "x", "create", stripe=1000), "stripe"),
        ):
            with pytest.raises(ValueError, match=word):
                call()
    file.close()
    for call in (lambda: file.read(0, memoryview(bytearray(1))), file.sync, lambda: file.resize(3)):
        with pytest.raises(ValueError, match="is closed"):
            call()


def test_a_closed_engine(tmp_path):
    engine = io.open_engine("threads")
    file = engine.open(tmp_path / "file", "create")
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="engine is closed"):
        file.write(0, memoryview(b"1"))
    with pytest.raises(ValueError, match="engine is closed"):
        engine.open(tmp_path / "other", "create")
    file.close()


def test_a_file_that_is_read_only(engine, tmp_path):
    (tmp_path / "file").write_bytes(bytes(10))
    with engine.open(tmp_path / "file", "read") as file, pytest.raises(TransferFailed, match="EBADF"):
        file.write(0, memoryview(b"1")).wait()


def test_a_failure_that_nobody_waited_for_is_logged(engine, tmp_path, caplog):
    (tmp_path / "file").write_bytes(bytes(10))
    with caplog.at_level(logging.WARNING, "powertrain.offload"):
        file = engine.open(tmp_path / "file", "read")
        file.read(0, memoryview(bytearray(20)))
        file.close()
    assert "the file ended" in caplog.text


def test_a_file_that_is_forgotten_is_closed_and_says_so(engine, tmp_path):
    with pytest.warns(ResourceWarning, match="was not closed"):
        engine.open(tmp_path / "file", "create")
