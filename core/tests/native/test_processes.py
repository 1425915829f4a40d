"""Several processes and one cache: one builds, and however it ends, no other is held up."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
from pathlib import Path

import pytest
from building import LIMIT, compiler, needs_compiler, residue, running, tiny, wait_for

from powertrain import native

pytestmark = [needs_compiler, pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc")]


def pid_in(path: Path) -> int:
    """Return the number that a process has written, once it has."""
    wait_for(lambda: path.exists() and path.read_text().endswith("\n"), f"{path.name} written")
    return int(path.read_text())


def test_eight_processes_build_once(tmp_path: Path, cache: Path, start) -> None:  # type: ignore[no-untyped-def]
    """Eight that ask at the same moment all get the module, and the compiler has run once."""
    log, go = tmp_path / "log", tmp_path / "go"
    cxx = compiler(tmp_path / "counted", f"echo compiled >> '{log}'; sleep 0.5")
    source = tiny(tmp_path / "source", 80)
    processes = [start(source.directory, go, CXX=cxx) for _ in range(8)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    go.touch()
    for process in processes:
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (0, "80\n"), err
    assert log.read_text() == "compiled\n"
    assert residue(cache) == []


def test_eight_processes_mend_once(tmp_path: Path, cache: Path, start) -> None:  # type: ignore[no-untyped-def]
    """Eight that find a build which is whole but does not load replace it once."""
    log, go = tmp_path / "log", tmp_path / "go"
    cxx = compiler(tmp_path / "counted", f"echo compiled >> '{log}'; sleep 0.5")
    source = tiny(tmp_path / "source", 81)
    (source.directory / "answer.h").write_text("#define ANSWER 81\n#ifdef MISSING\nint missing();\n#endif\n")
    process = start(source.directory, CXX=cxx)
    process.communicate(timeout=LIMIT)
    (record,) = cache.glob("tiny-*/build.json")
    (library,) = cache.glob("tiny-*/*.so")
    library.write_bytes(b"\x7fELF, and then something else" * 10)
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "digest": hashlib.sha256(library.read_bytes()).hexdigest()}))
    log.unlink()
    processes = [start(source.directory, go, CXX=cxx) for _ in range(8)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    go.touch()
    for process in processes:
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (0, "81\n"), err
    assert log.read_text() == "compiled\n"


def test_a_killed_build_holds_nobody_up(tmp_path: Path, cache: Path, start) -> None:  # type: ignore[no-untyped-def]
    """After SIGKILL in the middle of a build the next process builds at once, and clears away what was left."""
    once = f"[ -e '{tmp_path}/pid' ] || {{ echo $$ > '{tmp_path}/pid'; exec sleep 1000; }}"
    cxx = compiler(tmp_path / "slow once", once)
    source = tiny(tmp_path / "source", 82)
    killed = start(source.directory, CXX=f"'{cxx}'")
    orphan = pid_in(tmp_path / "pid")
    killed.kill()
    killed.wait(LIMIT)
    try:
        assert len(residue(cache)) == 2, "a lock's file and a building directory were to be left"
        process = start(source.directory, CXX=f"'{cxx}'", POWERTRAIN_BUILD_TIMEOUT="60")
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, out) == (0, "ready\n82\n"), err
        assert residue(cache) == []
    finally:
        if running(orphan):
            os.kill(orphan, signal.SIGKILL)


def test_waiting_has_a_limit_and_a_name(tmp_path: Path, cache: Path, start) -> None:  # type: ignore[no-untyped-def]
    """A process that waits for another's build longer than it may says for whom; the other goes on undisturbed."""
    go = tmp_path / "finish"
    once = f"echo $$ > '{tmp_path}/pid'; while [ ! -e '{go}' ]; do sleep 0.05; done"
    cxx = compiler(tmp_path / "slow", once)
    source = tiny(tmp_path / "source", 83)
    builder = start(source.directory, CXX=cxx)
    pid_in(tmp_path / "pid")
    waiting = start(source.directory, CXX=cxx, POWERTRAIN_BUILD_TIMEOUT="4")
    out, err = waiting.communicate(timeout=LIMIT)
    assert waiting.returncode == 1
    holder = f"process {builder.pid} on {socket.gethostname()}"
    assert "BuildFailed: [PT702] another process has been building for 4 s" in err
    assert f"found: {holder}" in err
    assert err.count(f"INFO powertrain.native: waiting for {holder} to build tiny-") == 1
    go.touch()
    out, err = builder.communicate(timeout=LIMIT)
    assert (builder.returncode, out) == (0, "ready\n83\n"), err
    assert residue(cache) == []


@pytest.mark.parametrize("signals", ["one", "the whole group"])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, cache: Path, start, signals: str) -> None:  # type: ignore[no-untyped-def]
    """Ctrl-C during a build ends the compiler and ninja, and leaves neither a lock nor a directory."""
    cxx = compiler(tmp_path / "slow", f"echo $$ > '{tmp_path}/pid'; exec sleep 1000")
    process = start(tiny(tmp_path / "source", 84).directory, CXX=cxx)
    child = pid_in(tmp_path / "pid")
    ninja = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    while Path(f"/proc/{ninja}/comm").read_text().strip() != "ninja":  # the compiler's shell stands between
        ninja = int(Path(f"/proc/{ninja}/stat").read_text().rpartition(")")[2].split()[1])
    if signals == "the whole group":  # a terminal sends it to ninja as well
        os.kill(ninja, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err
    wait_for(lambda: not running(child) and not running(ninja), "the end of the compiler and of ninja")
    assert residue(cache) == []


def test_a_child_after_fork_loads(tmp_path: Path, cache: Path) -> None:
    """What is built in one process is found by its child."""
    source = tiny(tmp_path / "source", 85)
    native.build(source)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if native.load(source).answer() == 85 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
