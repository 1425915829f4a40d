"""What a build is, when it is made again, and what it says when it cannot be made."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
from pathlib import Path

import attrs
import pytest
from building import compiler, needs_compiler, residue, running, tiny, wait_for

from powertrain import native
from powertrain.errors import BuildFailed, CompilerMissing, LaunchError
from powertrain.native import toolchain

pytestmark = needs_compiler


def test_it_is_built_once_and_found(tmp_path: Path, cache: Path) -> None:
    """Nothing is there before, one build is there afterwards, and it stays the same build."""
    source = tiny(tmp_path / "a source", 1)
    assert native.find(source) is None
    assert not cache.exists()
    built = native.build(source)
    assert native.find(source) == native.build(source) == built
    assert native.load(source).answer() == 1
    assert built.path.parent.parent == cache
    assert sorted(path.name for path in built.path.parent.iterdir()) == ["build.json", "build.ninja", built.path.name]
    assert residue(cache) == []
    again = native.build(source, again=True)
    assert again.path == built.path
    assert again.made > built.made


def test_ninja_and_the_compiler_are_heard(tmp_path: Path, cache: Path) -> None:
    """``progress`` gets each step."""
    lines: list[str] = []
    native.build(tiny(tmp_path / "source", 2), progress=lines.append)
    assert any("[1/2]" in line and "tiny.cpp" in line for line in lines), lines


@pytest.mark.parametrize("change", ["unit", "header", "new file", "flag", "library", "compiler", "arguments"])
def test_what_changes_a_build_changes_its_key(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A change of text, headers, flags or compiler is another build, and taking it back is the first one again."""
    source = tiny(tmp_path / "source", 3)
    first = native.build(source)
    with monkeypatch.context() as patch:
        changed = source
        if change == "unit":
            (source.directory / "tiny.cpp").write_text((source.directory / "tiny.cpp").read_text() + "// more\n")
        elif change == "header":
            (source.directory / "answer.h").write_text("#define ANSWER 4\n")
        elif change == "new file":
            (source.directory / "deeper").mkdir()
            (source.directory / "deeper" / "part.hh").write_text("\n")
        elif change == "flag":
            changed = tiny(tmp_path / "source", 3, "-DMORE")
        elif change == "library":
            changed = attrs.evolve(source, libraries=("m",))
        elif change == "compiler":
            script = tmp_path / "other"
            script.write_text('#!/bin/sh\ncase "$*" in --version) echo other 1.0;; *) exec c++ "$@";; esac\n')
            script.chmod(0o755)
            patch.setenv("CXX", str(script))
        else:
            patch.setenv("CXX", "c++ -DFROM_CXX")
        assert native.find(changed) is None
    tiny(tmp_path / "source", 3)
    if change == "new file":
        (source.directory / "deeper" / "part.hh").unlink()
    assert native.find(source) == first


def test_cxx_is_a_command_with_arguments(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``CXX="c++ -D…"`` works as it does with make."""
    directory = tmp_path / "source"
    source = tiny(directory, 5)
    (directory / "answer.h").write_text("#define ANSWER FROM_CXX\n")
    monkeypatch.setenv("CXX", "c++ -DFROM_CXX='(40 + 2)'")
    assert native.load(source).answer() == 42


@pytest.mark.parametrize("damage", ["cut short", "other bytes", "no record", "nonsense", "no library"])
def test_damaged_builds_are_built_again(tmp_path: Path, cache: Path, start, damage: str) -> None:  # type: ignore[no-untyped-def]
    """Whatever has happened to a build, the next process has a good one, and lives."""
    source = tiny(tmp_path / "source", 6)
    built = native.build(source)
    record = built.path.parent / "build.json"
    content = built.path.read_bytes()
    if damage == "cut short":
        built.path.write_bytes(content[: len(content) // 2])
    elif damage == "other bytes":
        built.path.write_bytes(content[:-64] + bytes(64))
    elif damage == "no record":
        record.unlink()
    elif damage == "nonsense":
        record.write_text("[1, 2")
    else:
        built.path.unlink()
    assert native.find(source) is None
    out, err = (process := start(source.directory)).communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.split() == ["ready", "6"]
    assert native.find(source) is not None


def test_a_build_that_does_not_load_is_built_again(tmp_path: Path, cache: Path, start) -> None:  # type: ignore[no-untyped-def]
    """A file that is whole but does not load here, as if made on another system, is replaced once."""
    source = tiny(tmp_path / "source", 7)
    built = native.build(source)
    other = native.build(native.Source("other", tiny(tmp_path / "other", 8).directory, source.units))
    record = (built.path.parent / "build.json").read_text()
    built.path.write_bytes(other.path.read_bytes()[:16] + bytes(200))
    digest = hashlib.sha256(built.path.read_bytes()).hexdigest()
    old = json.loads(record)
    (built.path.parent / "build.json").write_text(json.dumps({**old, "digest": digest}))
    assert native.find(source) == built
    out, err = (process := start(source.directory)).communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.split() == ["ready", "7"]
    replaced = native.find(source)
    assert replaced is not None
    assert replaced.made > built.made


def test_the_compilers_words_are_in_the_error(tmp_path: Path, cache: Path) -> None:
    """An error of the compiler is told with its file and line, and nothing is left behind."""
    source = tiny(tmp_path / "source", 9)
    (source.directory / "answer.h").write_text('#error "there is no answer"\n')
    with pytest.raises(BuildFailed, match="tiny does not compile") as caught:
        native.build(source)
    assert 'answer.h:1:2: error: #error "there is no answer"' in (caught.value.found or "")
    assert residue(cache) == []
    assert native.find(source) is None


@pytest.mark.parametrize("asked", ["no-such-compiler", "false", "'", "sleep"])
def test_cxx_that_is_no_compiler(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """A CXX that is not there, fails, or is no command at all is named."""
    if asked == "sleep":
        script = tmp_path / "no program"
        script.write_bytes(b"\x00\x01 no format that the system runs")
        script.chmod(0o755)
        asked = f"'{script}'"
    monkeypatch.setenv("CXX", asked)
    with pytest.raises(CompilerMissing) as caught:
        native.build(tiny(tmp_path / "source", 10))
    assert caught.value.message == f"CXX names no compiler: {asked}"
    assert caught.value.where == "CXX"
    assert not cache.exists()


def test_nothing_on_the_path(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler the error says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerMissing, match="there is no C\\+\\+ compiler") as caught:
        native.build(tiny(tmp_path / "source", 11))
    assert "install" in caught.value.remedy


def test_no_ninja(tmp_path: Path, cache: Path, start) -> None:  # type: ignore[no-untyped-def]
    """A ninja package without its program, and none on the path: the error says how to get one."""
    package = tmp_path / "site" / "ninja"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"BIN_DIR = {str(tmp_path)!r}\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("c++", "as", "ld", "sh"):
        target = subprocess.run(["sh", "-c", f"command -v {name}"], capture_output=True, text=True, check=True)
        (programs / name).symlink_to(target.stdout.strip())
    process = start(tiny(tmp_path / "source", 12).directory, PYTHONPATH=str(package.parent), PATH=str(programs))
    _, err = process.communicate(timeout=60)
    assert "there is no ninja" in err
    assert "to fix: pip install ninja" in err


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "powertrain.native"]


def test_the_reference_takes_over_with_one_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing can be built ``try_load`` answers None, and one warning says why, what runs, and the remedy."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.INFO, "powertrain.native"):
        assert native.try_load(tiny(tmp_path / "source", 13), "the reference") is None
    (line,) = lines_of(caplog)
    assert line.startswith("CXX names no compiler: no-such-compiler; the reference runs instead. To fix: install")


def test_native_code_can_be_left_out(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """POWERTRAIN_NATIVE=0 builds and loads nothing, and says so once."""
    monkeypatch.setenv("POWERTRAIN_NATIVE", "0")
    with caplog.at_level(logging.INFO, "powertrain.native"):
        assert native.try_load(tiny(tmp_path / "source", 14), "the reference") is None
    (line,) = lines_of(caplog)
    assert "POWERTRAIN_NATIVE=0" in line
    assert "the reference runs instead" in line
    assert not cache.exists()


def test_a_file_in_the_caches_place(tmp_path: Path, cache: Path) -> None:
    """A cache that cannot be made is an error with a way out."""
    cache.parent.write_text("in the way")
    with pytest.raises(BuildFailed, match="its cache cannot be written") as caught:
        native.build(tiny(tmp_path / "source", 15))
    assert "POWERTRAIN_CACHE" in caught.value.remedy
    assert str(cache.parent) in (caught.value.where or "")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_not_be_written(tmp_path: Path, cache: Path) -> None:
    """A directory of somebody else's is an error with a way out."""
    cache.parent.mkdir(mode=0o500)
    with pytest.raises(BuildFailed, match="its cache cannot be written") as caught:
        native.build(tiny(tmp_path / "source", 16))
    assert "POWERTRAIN_CACHE" in caught.value.remedy


def test_a_full_disk(tmp_path: Path, cache: Path) -> None:
    """A disk that fills up during the build is called full, and nothing half-made is left on it."""
    cache.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(cache)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        with pytest.raises(BuildFailed, match="the disk is full") as caught:
            native.build(tiny(tmp_path / "source", 17))
        assert "make room" in caught.value.remedy
        assert os.strerror(errno.ENOSPC) == caught.value.found
        assert residue(cache) == []
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_headers_of_the_core_are_part_of_the_key() -> None:
    """The core's own headers lie where ``INCLUDE`` says, each with the include guard that several units need."""
    headers = [path for path in native.INCLUDE.rglob("*") if path.is_file()]
    assert {"formats.h", "paths.h", "threads.h", "vector.inl", "combine.inl"} <= {path.name for path in headers}
    assert all("#pragma once" in path.read_text() for path in headers)


def test_paths_of_a_machine() -> None:
    """x86 has three vector paths; other machines have the plain one."""
    names = [unit.name for unit in native.vector_units("loops.cpp", "x86_64")]
    assert names == ["loops_plain", "loops_avx2", "loops_avx512"]
    assert [unit.name for unit in native.vector_units("loops.cpp", "aarch64")] == ["loops_plain"]


def test_the_processors_instructions_are_part_of_the_key() -> None:
    """What the key takes from the machine names its architecture and, on Linux, its instruction sets."""
    words = toolchain.processor().split()
    assert words[0] == os.uname().machine
    if Path("/proc/cpuinfo").exists():
        assert len(words) > 5


def test_a_compiler_that_takes_too_long(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build has POWERTRAIN_BUILD_TIMEOUT seconds; then its compilers are ended, and nothing is left."""
    monkeypatch.setenv("CXX", compiler(tmp_path / "slow", f"echo $$ > '{tmp_path}/pid'; exec sleep 1000"))
    monkeypatch.setenv("POWERTRAIN_BUILD_TIMEOUT", "2")
    with pytest.raises(BuildFailed, match="tiny was not built within 2 s") as caught:
        native.build(tiny(tmp_path / "source", 18))
    assert "POWERTRAIN_BUILD_TIMEOUT" in caught.value.remedy
    child = int((tmp_path / "pid").read_text())
    wait_for(lambda: not running(child), "the end of the compiler")
    assert residue(cache) == []


def test_without_locks_builds_do_not_hurt_one_another(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without locks another's unfinished build stays, and one that was as fast is taken."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    cache.mkdir(parents=True)
    source = tiny(tmp_path / "source", 90)
    first = native.build(source)
    other = cache / f".building-tiny-{first.key}-other"
    other.mkdir()

    kept = first.path.parent.rename(tmp_path / "kept")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.startswith(".building-"):
            real(kept, target)
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert native.build(source) == first
    assert other.is_dir()


def test_who_may_read_the_cache_may_read_what_is_built(tmp_path: Path, cache: Path) -> None:
    """What an image's builder has built another user can load."""
    cache.mkdir(parents=True, mode=0o755)
    cache.chmod(0o755)
    built = native.build(tiny(tmp_path / "source", 91))
    assert built.path.parent.stat().st_mode & 0o777 == 0o755
    assert built.path.stat().st_mode & 0o444


def test_a_switch_that_is_neither_on_nor_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``POWERTRAIN_NATIVE=off`` does not run C++ in silence."""
    monkeypatch.setenv("POWERTRAIN_NATIVE", "off")
    with pytest.raises(LaunchError, match="POWERTRAIN_NATIVE is neither 0 nor 1"):
        native.try_load(tiny(tmp_path / "source", 15), "the reference")
