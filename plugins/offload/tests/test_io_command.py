"""``powertrain io bench``: what it prints, writes, refuses, and leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tomli
from click.testing import CliRunner

from powertrain_offload.io import paste, raw, report, sizes, sweep
from powertrain_offload.io.command import io
from powertrain_offload.io.report import Report
from powertrain_offload.io.sweep import Choice, Speed


@pytest.fixture
def quick(monkeypatch):
    """Try little, and without fio."""
    tried = [Choice("threads", 4 << 20, 2), Choice("threads", 1 << 20, 4)]
    monkeypatch.setattr(sweep, "choices", lambda kinds, room: tried)
    monkeypatch.setattr(raw, "tool", lambda: None)


def bench(*arguments):
    given = ["bench", *map(str, arguments)]
    if "--size" not in given:
        given += ["--size", "64MiB", "--rounds", "1"]
    return CliRunner().invoke(io, given)


def test_a_line_a_setting_and_what_to_paste(quick, tmp_path):
    found = bench(tmp_path)
    assert found.exit_code == 0, found.output
    rows = found.output.splitlines()
    assert rows[0].split("  ")[0] == "ENGINE"
    assert [row.split()[0] for row in rows[1:3]] == ["threads", "threads"]
    assert sum("best" in row for row in rows[1:3]) == 1
    assert "of the disk's own speed" in found.output
    assert "fio is not installed" in found.output
    table = tomli.loads(found.output[found.output.index("[offload]") :])["offload"]
    assert set(table) == {"engine", "block", "depth", "threads"}
    assert list(tmp_path.iterdir()) == []


def test_json_for_programs(quick, tmp_path):
    found = json.loads(bench(tmp_path, "--json").stdout)
    assert (found["path"], found["size"], found["rounds"]) == (str(tmp_path), 64 << 20, 1)
    assert len(found["settings"]) == 2
    assert {"engine", "block", "depth", "threads", "read_GBps", "write_GBps"} == set(found["best"])
    assert found["raw"]["tool"] is None
    assert set(found["ratio"]) == {"read", "write"}


@pytest.mark.skipif(raw.tool() is None, reason="fio is not installed")
def test_fio_tells_the_speed_where_it_is_installed(quick, tmp_path, monkeypatch):
    tool = raw.shutil.which("fio")
    monkeypatch.setattr(raw, "tool", lambda: tool)
    found = json.loads(bench(tmp_path, "--json").stdout)
    assert found["raw"]["tool"].startswith("fio")
    assert found["raw"]["read_GBps"] > 0


def test_the_best_is_written_and_comments_stay(quick, tmp_path):
    config = tmp_path / "train.toml"
    text = (
        "# mine\n[batch]\nmicro = 8  # samples\n\n"
        "[offload]  # all of it\npath = \"/x\"\n  engine = 'auto'   # which\nblock = 1_048_576\n\n[data]\n"
    )
    config.write_text(text)
    found = bench(tmp_path, "--write", config)
    assert found.exit_code == 0, found.output
    written = config.read_text()
    table = tomli.loads(written)["offload"]
    assert table["engine"] == "threads"
    assert table["path"] == "/x"
    assert '  engine = "threads"   # which\n' in written
    for kept in ("# mine\n", "micro = 8  # samples\n", "[offload]  # all of it\n", "\n\n[data]\n"):
        assert kept in written
    again = bench(tmp_path, "--write", config)
    assert again.exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["train.toml"]


VALUES = {"engine": "uring", "block": 4096, "depth": 8, "threads": 2}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[a]\nb = 1",
        "# only a comment\n",
        "[offload]",
        "[offload]\ndepth = 1 # x\n[offload.more]\na = 1\n",
        '["offload"]\n"depth" = 1\n',
        'note = """\n[offload]\ndepth = 3\n"""\n[offload]\ndepth = 4\n',
        "[offload.more]\na = 1\n",
        'offload.engine = "a#b"\noffload.block=1\noffload.depth = 1\noffload.threads = 1 # y\n',
        'offload = {engine = "auto", block = 1, depth=2, threads = 3}\n',
        "[offload]\r\ndepth = 1\r\n[x]\r\n",
    ],
)
def test_a_table_is_edited_as_text(text):
    found = paste.edited(text, "offload", VALUES)
    wanted = tomli.loads(text.replace("\r\n", "\n"))
    wanted["offload"] = {**wanted.get("offload", {}), **VALUES}
    assert tomli.loads(found.replace("\r\n", "\n")) == wanted
    assert paste.edited(found, "offload", VALUES) == found
    for comment in ("# only a comment", "# x", "# y"):
        assert (comment in text) == (comment in found)
    assert ("\r\n" in text) == ("\r\n" in found)


@pytest.mark.parametrize("text", ["offload = {depth = 2}\n", "offload.depth = 2\n"])
def test_a_table_that_cannot_be_edited_is_left_alone(text, quick, tmp_path):
    config = tmp_path / "train.toml"
    config.write_text(text)
    found = bench(tmp_path, "--write", config)
    assert found.exit_code == 2
    assert "set by hand: engine = " in found.output
    assert config.read_text() == text


def test_a_file_keeps_its_mode_and_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real.toml", tmp_path / "link.toml"
    real.write_text("[offload]\n")
    real.chmod(0o640)
    link.symlink_to(real)
    paste.write(str(link), "offload", VALUES)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert tomli.loads(real.read_text())["offload"] == VALUES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/missing"], "does not exist"),
        (["{}/file"], "is not a directory"),
        (["{}", "--size", "4096TB"], "no room for a file"),
        (["{}", "--size", "much"], "no size; write 512MiB"),
        (["{}", "--size", "1MiB"], "too little to measure"),
        (["{}", "--write", "{}/missing.toml"], "missing.toml"),
        (["{}", "--write", "{}/file"], "file:1:"),
        (["{}", "--rounds", "0"], "--rounds"),
    ],
)
def test_mistakes_are_told_without_a_traceback(arguments, words, tmp_path):
    (tmp_path / "file").write_text("not = = toml")
    given = [argument.format(tmp_path) for argument in arguments]
    command = [sys.executable, "-m", "powertrain.cli", "io", "bench", *given]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert words in found.stderr
    assert "Traceback" not in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    found = bench(tmp_path)
    assert "cannot be written to" in str(found.exception)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_by_a_measurement_that_is_ended(tmp_path, number):
    command = [sys.executable, "-m", "powertrain.cli", "io", "bench", str(tmp_path), "--size", "128MiB"]
    process = subprocess.Popen([*command, "--rounds", "100"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(2)
        assert process.poll() is None, process.communicate()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in err
    if number == signal.SIGINT or sys.platform.startswith("linux"):
        assert list(tmp_path.iterdir()) == []


def test_the_heat_map_marks_the_best():
    from rich.console import Console

    fast, slow = Choice("uring", 1 << 20, 4), Choice("uring", 4 << 20, 16)
    found = {fast: Speed([4e9], [2e9]), slow: Speed([1e9], [1e9]), Choice("uring", 1 << 20, 16): Speed()}
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123 (recorded)
    console.print(report.heat_map(found, "uring", fast))
    console.file.close()
    text = console.export_text()
    assert "2.00 / 4.00 ★" in text
    assert "1.00 / 1.00" in text
    assert "depth 16" in text
    assert "…" in text  # not tried yet


def test_the_best_is_what_reads_and_writes_everything_soonest():
    found = {Choice("uring", 4096, 1): Speed([9e9], [1e9]), Choice("direct", 4096, 1): Speed([3e9], [3e9])}
    raw_speed = {"a": Speed([6e9], [4e9]), "b": Speed([1e9], [5e9])}
    whole = Report("/x", 1, 1, found, raw_speed, "fio-3", {"threads": "why"}, "slow")
    assert whole.best.engine == "direct"
    data = whole.as_json()
    assert data["ratio"] == {"read": 0.6, "write": 0.5}
    assert (data["raw"]["read_by"], data["raw"]["write_by"]) == ("b", "a")
    lines = report.summary(whole)
    assert any("page cache: slow" in line for line in lines)
    assert any("threads was left out: why" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1GiB", 1 << 30), ("512MB", 512 * 10**6), ("4096", 4096), ("1.5g", 3 << 29), ("2 KiB", 2048), ("7b", 7)],
)
def test_sizes(text, count):
    assert sizes.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1XB", "1 2"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="no size"):
        sizes.parse_size(text)


def test_the_choices_fit_into_memory():
    tried = sweep.choices(["uring", "direct", "threads"], 64 << 20)
    assert {choice.engine for choice in tried} == {"uring", "direct", "threads"}
    assert all(choice.block * choice.at_once <= 64 << 20 for choice in tried)
