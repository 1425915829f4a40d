"""`powertrain plugins` and the commands of plugins, with every kind of broken plugin installed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

BROKEN = {
    "importerror": ("broken", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
    "syntaxerror": ("broken", "SyntaxError: "),
    "wrongtype": ("broken", "is not a Plugin class: 42"),
    "constructs": ("broken", "RuntimeError: no such luck"),
    "stale": ("broken", "ModuleNotFoundError: No module named 'farm_stale'"),
    "exits": ("broken", "SystemExit: 3"),
    "newer": ("incompatible", "API 99"),
    "twice": ("conflict", "also claimed by farm-two"),
}

COMMAND = """
import click
from powertrain.plugin import Plugin
from powertrain.hookspecs import hookimpl

class ThePlugin(Plugin):
    name, api = {name!r}, 1

    @hookimpl
    def add_commands(self, cli):
        @cli.command(help="Say hello.")
        def hello():
            click.echo("hello from {name!r}")
"""


def states(done):
    """The plugins that `plugins --json` printed, by name."""
    assert done.returncode == 0, done.stderr
    return {plugin["name"]: plugin for plugin in json.loads(done.stdout)}


def test_json_has_every_fact(powertrain, farm):
    """The JSON of a plugin says where it comes from, what it does and whether it can be used."""
    farm.add("hello", COMMAND)
    assert states(powertrain("plugins", "--json", farm=farm))["hello"] == {
        "name": "hello",
        "distribution": "farm-hello",
        "version": "1.2",
        "api": 1,
        "hooks": ["add_commands"],
        "roles": [],
        "state": "available",
        "why": "on with a [hello] section",
        "support": "community",
        "maintainer": "",
        "summary": "Made for hello.",
        "device": None,
    }


def test_each_broken_plugin_is_listed_with_its_reason(powertrain, broken_farm):
    """One broken plugin never hides another: each is listed once, with its state and why."""
    found = states(powertrain("plugins", "--json", farm=broken_farm))
    assert found["good"]["state"] == "available"
    for name, (state, why) in BROKEN.items():
        assert found[name]["state"] == state
        assert why in found[name]["why"]


def test_table_has_one_line_a_plugin(powertrain, broken_farm):
    """In a pipe the table has one whole line for each plugin, and nothing goes to standard error."""
    done = powertrain("plugins", farm=broken_farm)
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines].count("twice") == 1
    for name, (state, why) in BROKEN.items():
        (line,) = [line for line in lines if line.startswith(name + " ")]
        assert state in line and why in line


def test_help_survives_broken_plugins_with_one_line_each(powertrain, broken_farm):
    """--help works beside broken plugins, each costs one line that says how to silence it."""
    done = powertrain("--help", farm=broken_farm)
    assert done.returncode == 0 and "launch" in done.stdout
    warnings = done.stderr.splitlines()
    assert len(warnings) == len(BROKEN)
    for name in BROKEN:
        (line,) = [line for line in warnings if f"plugin {name!r}" in line]
        assert f"--no-plugin {name}" in line and "farm_" in line


def test_strict_plugins_make_a_broken_one_fatal(powertrain, broken_farm):
    """POWERTRAIN_STRICT_PLUGINS=1 ends the listing of commands with the first broken plugin's error."""
    done = powertrain("--help", farm=broken_farm, POWERTRAIN_STRICT_PLUGINS="1")
    assert done.returncode == 2
    assert "[PT2" in done.stderr and "Traceback" not in done.stderr


def test_plugins_can_be_turned_off(powertrain, broken_farm):
    """POWERTRAIN_PLUGINS and --no-plugin turn plugins off unimported, and the list says which did."""
    only = states(powertrain("plugins", "--json", farm=broken_farm, POWERTRAIN_PLUGINS="good"))
    assert only["good"]["state"] == "available"
    assert {only[name]["why"] for name in BROKEN} == {"disabled by POWERTRAIN_PLUGINS"}
    none = states(powertrain("plugins", "--json", farm=broken_farm, POWERTRAIN_PLUGINS="none"))
    assert {plugin["state"] for plugin in none.values()} == {"disabled"}
    some = states(powertrain("--no-plugin", "good", "--no-plugin", "stale", "plugins", "--json", farm=broken_farm))
    assert {name for name, plugin in some.items() if plugin["state"] == "disabled"} == {"good", "stale"}


def test_turning_off_reaches_help_and_child_processes(powertrain, farm, tmp_path):
    """--no-plugin removes a plugin's commands and is passed on to what is started from here."""
    farm.add("hello", COMMAND)
    assert "hello" in powertrain("--help", farm=farm).stdout
    assert "hello" not in powertrain("--no-plugin", "hello", "--help", farm=farm).stdout
    script = tmp_path / "child.py"
    script.write_text("import os; print(os.environ['POWERTRAIN__PLUGINS__DISABLE'])")
    command = ("--no-plugin", "hello", "launch", "--nproc", "1", str(script))
    done = powertrain(*command, farm=farm, POWERTRAIN__PLUGINS__DISABLE='["cpu"]')
    assert json.loads(done.stdout) == ["cpu", "hello"], done.stderr


def test_leaving_out_what_is_not_there_is_a_usage_error(powertrain, farm):
    """--no-plugin with a name that no installed plugin has exits with 2 and names the nearest."""
    farm.add("hello")
    done = powertrain("--no-plugin", "helo", "plugins", farm=farm)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no plugin called 'helo' is installed; did you mean 'hello'?" in done.stderr


def test_plugin_command_runs(powertrain, farm, broken_farm):
    """A command that a plugin adds is listed and runs, whatever else is broken."""
    farm.add("hello", COMMAND)
    assert "Say hello." in powertrain("--help", farm=farm).stdout
    done = powertrain("hello", farm=farm)
    assert (done.returncode, done.stdout) == (0, "hello from 'hello'\n")


def test_two_plugins_cannot_have_one_command(powertrain, farm):
    """A command that two plugins claim goes to neither, and the warning names both."""
    farm.add("one", COMMAND)
    farm.add("two", COMMAND)
    done = powertrain("hello", farm=farm)
    assert done.returncode == 2
    assert "'one' and 'two' claim it" in done.stderr


def test_core_commands_cannot_be_taken(powertrain, farm):
    """A plugin that adds a command of the core's name does not replace it."""
    farm.add("thief", COMMAND.replace("def hello", "def doctor"))
    done = powertrain("--help", farm=farm)
    assert "'thief' and powertrain itself claim it" in done.stderr
    assert "Check this machine" in done.stdout


def test_hook_that_fails_halfway_leaves_nothing(powertrain, farm):
    """A plugin whose add_commands raises after adding one command adds none."""
    farm.add("half", COMMAND + "        raise OSError('half way')\n")
    done = powertrain("--help", farm=farm)
    assert "OSError: half way" in done.stderr
    assert "hello" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "used"),
    [
        (["--version"], []),
        (["launch", "--dry-run", "--nproc", "2", "script.py"], []),
        (["config", "check", "train.toml"], ["farm_p7"]),
    ],
)
def test_unused_plugins_are_not_imported(environ, farm, tmp_path, arguments, used):
    """Among 50 plugins and 500 other distributions, only those that a command needs are imported."""
    for index in range(50):
        farm.add(f"p{index}")
    for index in range(500):
        farm.add_dummy(index)
    (tmp_path / "script.py").touch()
    (tmp_path / "train.toml").write_text("[p7]\n")
    code = (
        "import sys\nfrom powertrain.cli.root import cli\n"
        f"try: cli.main({arguments!r})\nexcept SystemExit as exit: assert not exit.code, exit.code\n"
        "loaded = [name for name in sys.modules if name.startswith('farm_') or name == 'torch']\n"
        f"assert loaded == {used!r}, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environ, "PYTHONPATH": str(farm.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
