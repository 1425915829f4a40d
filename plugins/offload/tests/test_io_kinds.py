"""Which engine is chosen, and what happens where one does not work."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from powertrain import native
from powertrain.errors import CompilerMissing, EngineUnavailable
from powertrain_offload import io
from powertrain_offload.io import native as engines
from powertrain_offload.io.selftest import check

LINUX = sys.platform.startswith("linux")


def test_the_fastest_that_works_is_chosen(caplog):
    working = [kind for kind, reason in io.available().items() if reason is None]
    assert working[-1] == "threads"
    with caplog.at_level(logging.DEBUG, "powertrain.offload"), io.open_engine() as engine:
        assert engine.name == working[0]
    (record,) = [record for record in caplog.records if record.name == "powertrain.offload"]
    assert record.message.startswith(f"file engine {working[0]}")


def refuse(monkeypatch, *kinds):
    """Have the kernel refuse these kinds."""
    make = engines.NativeEngine.__init__

    def init(self, module, kind, settings):
        if kind in kinds:
            raise RuntimeError("io_uring_setup: Operation not permitted")
        make(self, module, kind, settings)

    monkeypatch.setattr(engines.NativeEngine, "__init__", init)


@pytest.mark.parametrize(("refused", "chosen"), [(("uring",), "direct"), (("uring", "direct"), "threads")])
def test_the_next_is_taken_where_one_is_refused(monkeypatch, caplog, refused, chosen):
    if io.available()["direct"]:
        pytest.skip("no C++ here")
    refuse(monkeypatch, *refused)
    with caplog.at_level(logging.DEBUG, "powertrain.offload"), io.open_engine() as engine:
        assert engine.name == chosen
    for kind in refused:
        assert f"not {kind}: io_uring_setup: Operation not permitted" in caplog.text
        with pytest.raises(EngineUnavailable, match=kind) as caught:
            io.open_engine(kind)
        assert caught.value.found == io.available()[kind] == "io_uring_setup: Operation not permitted"


@pytest.mark.skipif(not LINUX, reason="C++ engines need Linux")
def test_without_a_compiler(monkeypatch):
    def missing(_source):
        raise CompilerMissing("there is no C++ compiler")

    monkeypatch.setattr(native, "load", missing)
    with io.open_engine() as engine:
        assert engine.name == "threads"
    with pytest.raises(EngineUnavailable) as caught:
        io.open_engine("uring")
    assert "there is no C++ compiler" in caught.value.found


def test_without_what_is_native(monkeypatch):
    monkeypatch.setenv("POWERTRAIN_NATIVE", "0")
    assert [kind for kind, reason in io.available().items() if reason is None] == ["threads"]


SECCOMP = """
import ctypes, struct, sys
from powertrain_offload import io
libc = ctypes.CDLL(None, use_errno=True)
# io_uring_setup has the same number on all architectures: load it, compare, answer EPERM or allow.
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
program = Program(len(steps), ctypes.addressof(code))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
    sys.exit("no seccomp")
print(io.available()["uring"])
with io.open_engine() as engine:
    print(engine.name)
"""


@pytest.mark.skipif(not LINUX, reason="needs Linux")
def test_a_container_that_forbids_io_uring():
    if io.available()["direct"]:
        pytest.skip("no C++ here")
    found = subprocess.run([sys.executable, "-c", SECCOMP], capture_output=True, text=True, timeout=60)
    if "no seccomp" in found.stderr:
        pytest.skip("no filters here")
    assert found.stdout.splitlines() == ["io_uring_setup: Operation not permitted", "direct"], found.stderr


@pytest.mark.skipif(not LINUX or not Path("/dev/shm").is_dir(), reason="no file system in memory")
@pytest.mark.parametrize("kind", ["uring", "direct"])
def test_a_file_system_without_direct_transfers(kind, caplog, tmp_path_factory):
    import tempfile

    if reason := io.available()[kind]:
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as place,
        io.open_engine(kind) as engine,
        caplog.at_level(logging.DEBUG, "powertrain.offload"),
        engine.open(f"{place}/file", "create") as file,
    ):
        assert not file.direct
        assert "page cache" in file.why_buffered
        assert f"{place}/file goes through the page cache" in caplog.text


@pytest.mark.skipif(not LINUX, reason="needs Linux")
@pytest.mark.parametrize("kind", ["uring", "direct"])
def test_a_file_system_that_refuses_the_flag(kind, tmp_path, monkeypatch):
    import errno
    import os

    if reason := io.available()[kind]:
        pytest.skip(reason)
    real = os.open

    def refusing(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", path)
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    with io.open_engine(kind) as engine, engine.open(tmp_path / "file", "create") as file:
        assert "refuses O_DIRECT" in file.why_buffered
        file.write(0, memoryview(bytes(100_000))).wait()


@pytest.mark.skipif(not LINUX, reason="needs Linux")
@pytest.mark.parametrize("kind", ["uring", "direct"])
def test_a_file_that_wants_more_alignment_than_it_says(kind, tmp_path, monkeypatch):
    """The kernel answers EINVAL, and the page cache serves."""
    if reason := io.available()[kind]:
        pytest.skip(reason)
    monkeypatch.setattr(engines.NativeEngine, "_alignment", lambda self: lambda descriptor, otherwise: (1, 512))
    with io.open_engine(kind) as engine, engine.open(tmp_path / "file", "create") as file:
        memory = engine.buffer(1 << 20)
        memory[:] = bytes(range(256)) * 4096
        file.write(0, memory[1:500_001]).wait()
        found = engine.buffer(1 << 20)[3:500_003]
        file.read(0, found).wait()
        assert found == memory[1:500_001]


def test_numbers_that_no_engine_works_with():
    for named, word in (
        ({"block": 0}, "block"),
        ({"block": 5000}, "block"),
        ({"block": 1 << 31}, "block"),
        ({"depth": 0}, "depth"),
        ({"threads": 0}, "threads"),
        ({"kind": "fast"}, "kind"),
    ):
        with pytest.raises(ValueError, match=word):
            io.open_engine(**named)


def test_the_selftest_finds_nothing_wrong():
    if io.available()["direct"]:
        pytest.skip("no C++ here")
    found = list(check(10))
    assert {each.kernel for each in found} == {"uring", "direct"}
    assert all(each.good for each in found)


def test_the_example_runs():
    text = io.__doc__.partition("\n\n")[2].partition("\n\nThree kinds")[0]
    exec(textwrap.dedent(text), {})


def test_torch_is_not_needed():
    code = "import sys, powertrain_offload.io as io; io.open_engine().close(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
