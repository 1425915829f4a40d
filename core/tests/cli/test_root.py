"""The top of the command line: help, exit codes, errors in words."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from powertrain.cli.lazy import Lazy, LazyGroup
from powertrain.cli.root import COMMANDS, cli
from powertrain.errors import ConfigError, PowertrainError

HELP = [(), ("config",), ("doctor",), ("launch",), ("plugins",)]


@pytest.mark.parametrize("command", HELP, ids=lambda words: " ".join(words) or "powertrain")
def test_every_command_explains_itself(command):
    """Every command has a help page, reached by both spellings."""
    for option in ("-h", "--help"):
        result = CliRunner().invoke(cli, [*command, option])
        assert result.exit_code == 0, result.output
        assert "Usage: " in result.output


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_list_of_commands_says_what_each_is(name):
    """The line in the list of commands, written without importing it, belongs to a command of that name."""
    command = COMMANDS[name].load()
    assert command.name == name
    assert command.help and len(COMMANDS[name].help) <= 60


def test_version(powertrain):
    """--version prints the name and the version on standard output."""
    done = powertrain("--version")
    assert (done.returncode, done.stdout) == (0, "powertrain 0.1.0\n")


def test_misspelt_command_is_answered_with_the_nearest(powertrain):
    """A misspelt command exits with 2 and names the one that was meant, on standard error."""
    done = powertrain("plugin")
    assert done.returncode == 2
    assert "Did you mean 'plugins'?" in done.stderr
    assert not done.stdout and "Traceback" not in done.stderr


def test_misspelt_subcommand_is_answered_with_the_nearest(powertrain):
    """A misspelt subcommand of a group is answered like one of the top."""
    done = powertrain("plugins", "nwe")
    assert done.returncode == 2
    assert "Did you mean 'new'?" in done.stderr


@pytest.mark.parametrize("arguments", [("--no-such-option",), ("launch",), ("launch", "--nproc"), ("doctor", "extra")])
def test_usage_mistakes_exit_with_two(powertrain, arguments):
    """Whatever is wrong with the arguments, the exit code is 2 and there is no traceback."""
    done = powertrain(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Error: " in done.stderr and "Traceback" not in done.stderr


def _group_that_raises(error: BaseException) -> click.Group:
    group = type(cli)("powertrain")

    @group.command()
    def fail() -> None:
        raise error

    return group


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("it is wrong", problems=("a.toml:1:1 no",)), 2, "[PT100] it is wrong\n  a.toml:1:1 no"),
        (PowertrainError("the run failed"), 1, "[PT000] the run failed"),
        (FileNotFoundError(2, "No such file or directory", "a.toml"), 1, "Error: a.toml: No such file or directory"),
        (KeyError("x"), 1, "internal error: KeyError: 'x' (test_root.py:"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (SystemExit(7), 7, ""),
    ],
)
def test_failures_become_words_and_codes(monkeypatch, error, code, words):
    """Each kind of failure has its exit code and is told on standard error without a traceback."""
    monkeypatch.delenv("POWERTRAIN_LOG", raising=False)
    result = CliRunner().invoke(_group_that_raises(error), ["fail"])
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr and not result.stdout


def test_internal_error_shows_its_traceback_on_request(monkeypatch):
    """POWERTRAIN_LOG=debug adds the traceback of an error that is nobody's mistake but ours."""
    monkeypatch.setenv("POWERTRAIN_LOG", "debug")
    result = CliRunner().invoke(_group_that_raises(KeyError("x")), ["fail"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_unknown_log_level_is_a_usage_error(powertrain):
    """A POWERTRAIN_LOG that names no level is refused with the legal ones."""
    done = powertrain("plugins", POWERTRAIN_LOG="loud")
    assert done.returncode == 2
    assert "debug, info, warning, error" in done.stderr and "'loud'" in done.stderr


def test_reader_that_goes_away_is_no_error(environ):
    """`powertrain plugins --json | head -0` leaves nothing on standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "powertrain.cli", "plugins", "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environ,
    )
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, b"")


def test_narrow_and_plain_terminals(powertrain):
    """An encoding without the signs and a width of 20 columns break nothing."""
    done = powertrain("plugins", PYTHONIOENCODING="ascii", COLUMNS="20", NO_COLOR="1", TERM="dumb")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("columns", [30, 200])
def test_table_on_a_terminal(environ, columns):
    """A terminal shows every plugin, in columns or, where it is too narrow for them, one below the other."""
    main, terminal = os.openpty()
    command = [sys.executable, "-m", "powertrain.cli", "doctor", "--time-limit", "0.1"]
    with subprocess.Popen(
        command, stdout=terminal, env={**environ, "TERM": "xterm", "COLUMNS": str(columns)}
    ) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side closed
            while chunk := os.read(main, 4096):
                shown += chunk
    os.close(main)
    assert process.returncode == 0
    assert (b"AREA" in shown) == (columns == 200)
    assert b"\x1b[1;31mfail" in shown


def test_help_imports_neither_torch_nor_the_commands(environ):
    """Listing the commands imports none of them, and no torch."""
    code = (
        "import sys\nfrom powertrain.cli.root import cli\n"
        "try: cli.main(['--help'], prog_name='powertrain')\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'rich', 'powertrain.cli.launch', 'powertrain.cli.doctor', 'powertrain.cli.config'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_lazy_group_imports_on_use():
    """A lazy command is resolved from its module and attribute, and unknown names are refused."""
    group = LazyGroup("top", lazy={"show": Lazy("powertrain.cli.plugins:plugins", "Show.")})
    assert "Show." in CliRunner().invoke(group, ["--help"]).output
    assert CliRunner().invoke(group, ["show", "--help"]).exit_code == 0
    assert "Did you mean 'show'?" in CliRunner().invoke(group, ["shwo"]).stderr


def test_command_as_installed_script():
    """The `powertrain` script that pip writes runs the same command."""
    script = Path(sys.executable).with_name("powertrain")
    if not script.exists():
        pytest.skip("powertrain-core is not installed with its scripts")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == "powertrain 0.1.0\n"
