"""Signals, forks, and the end of a process with transfers under way."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from powertrain_offload import io

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /dev/null and mmap")

ENDLESS = """
import mmap, os, sys, signal
from powertrain_offload import io
engine = io.open_engine(sys.argv[1], block=4096, depth=1, threads=1)
file = engine.open("/dev/null", "update")
# A tebibyte of nothing, in small blocks: it takes minutes, and no memory.
memory = memoryview(mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ))
move = file.write(0, memory)
"""


@pytest.fixture(params=io.KINDS)
def kind(request):
    if reason := io.available()[request.param]:
        pytest.skip(reason)
    return request.param


def run(code, *args, timeout=60):
    command = [sys.executable, "-W", "error", "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_ctrl_c_ends_a_wait(kind):
    code = ENDLESS + (
        "try:\n"
        "    print('waiting', flush=True)\n"
        "    move.wait()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', move.done(), flush=True)\n"
        "    os._exit(0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, kind], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (out, process.returncode) == ("interrupted False\n", 0)


@pytest.mark.parametrize("end", ["sys.exit(3)", "del engine, move; sys.exit(3)"])
def test_a_process_ends_with_a_transfer_under_way(kind, end):
    found = run(ENDLESS + "import warnings; warnings.simplefilter('ignore')\n" + end, kind)
    assert (found.returncode, found.stdout) == (3, "")
    assert "Traceback" not in found.stderr
    assert "ECANCELED" in found.stderr  # what did not reach the disk is told


def test_an_exception_ends_a_process_with_a_transfer_under_way(kind):
    found = run(ENDLESS + "raise KeyError('mine')", kind)
    assert found.returncode == 1
    assert "KeyError: 'mine'" in found.stderr


def test_transfers_that_were_dropped_say_so(kind):
    code = ENDLESS + (
        "from powertrain.errors import TransferFailed\n"
        "engine._end()\n"
        "try:\n"
        "    move.wait()\n"
        "except TransferFailed as error:\n"
        "    print(error.message, '|', error.remedy)\n"
        "file.close()\n"
    )
    found = run(code, kind)
    assert "(ECANCELED) | wait for transfers" in found.stdout, found.stderr


FORKED = """
import os, sys
from powertrain.errors import EngineUnavailable
from powertrain_offload import io
engine = io.open_engine(sys.argv[1])
file = engine.open(sys.argv[2], "create")
memory = engine.buffer(64 << 20)
move = file.write(0, memory)
child = os.fork()
if child == 0:
    for call in (lambda: file.write(0, memory), move.wait, move.done, file.sync, lambda: engine.open("x", "read")):
        try:
            call()
        except EngineUnavailable as error:
            assert "forked" in error.message
        else:
            os._exit(9)
    with io.open_engine(sys.argv[1]) as own, own.open(sys.argv[2], "read") as same:
        pass
    sys.exit(0)  # what it has of its parent's goes without a hang
_, status = os.waitpid(child, 0)
move.wait()
file.close()
engine.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_process_that_is_forked_off(kind, tmp_path):
    found = run(FORKED, kind, str(tmp_path / "file"))
    assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / "file").stat().st_size == 64 << 20
