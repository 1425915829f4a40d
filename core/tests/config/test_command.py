"""``powertrain config``, as a person calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
from click.testing import CliRunner, Result

from powertrain.cli.root import cli


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["config", *arguments])

    return invoke


def test_a_good_file_is_ok(call, tmp_path: Path) -> None:
    """A file without problems prints one line on standard output and exits with 0."""
    (tmp_path / "a.toml").write_text("[batch]\nmicro = 2\n")
    result = call("check", "a.toml")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "a.toml: ok\n", "")


def test_every_file_is_checked(call, tmp_path: Path) -> None:
    """Problems of all files go to standard error, the good ones are told too, and the exit code is 2."""
    (tmp_path / "a.toml").write_text("[batch]\nmicr = 2\n")
    (tmp_path / "b.toml").write_text("[batch]\nmicro = 2\n")
    (tmp_path / "c.toml").write_text("[")
    result = call("check", "a.toml", "b.toml", "c.toml", "d.toml")
    assert (result.exit_code, result.stdout) == (2, "b.toml: ok\n")
    assert "a.toml:2:1  batch.micr: unknown key; did you mean batch.micro?" in result.stderr
    assert "c.toml:1:2  not valid TOML" in result.stderr
    assert "d.toml  no such file" in result.stderr


def test_check_knows_the_ranks_and_the_overrides(call, tmp_path: Path) -> None:
    """--ranks checks the batch triple exactly; --set wins over the file."""
    (tmp_path / "a.toml").write_text("[batch]\nmicro = 8\naccumulation = 4\ntotal = 64\n")
    assert call("check", "a.toml").exit_code == 0
    assert call("check", "a.toml", "--ranks", "2").exit_code == 0
    result = call("check", "a.toml", "--ranks", "4")
    assert result.exit_code == 2
    assert "a.toml:4:1  batch.total: micro 8 x accumulation 4 x 4 ranks = 128, but total = 64" in result.stderr
    assert call("check", "a.toml", "--ranks", "4", "--set", "batch.total=128").exit_code == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('disable = ["chekpoint"]', "plugins.disable[0]: no plugin called 'chekpoint' is installed; did you mean"),
        ('require = ["cpu>=0.1"]\ndisable = ["cpu"]', "plugins.require[0]: plugins.disable leaves 'cpu' out"),
        ('require = ["powertrain-cpu"]\ndisable = ["cpu"]', "plugins.disable leaves 'powertrain-cpu' out"),
        ('pin = { make_runer = "cpu" }', "plugins.pin.make_runer: there is no hook and no installed plugin called"),
        ('pin = { make_runer = "cpu" }', 'did you mean "make_runner"?'),
        ('pin = { make_runner = "cpuu" }', "plugins.pin.make_runner: no plugin or distribution called"),
        ('pin = { cpu = "powertrain-cpuu" }', 'did you mean "powertrain-cpu"?'),
        ('require = ["nowhere"]', "the required plugin 'nowhere' is not installed"),
    ],
)
def test_names_in_plugins_are_checked(call, tmp_path: Path, line: str, words: str) -> None:
    """A name in [plugins] that nothing installed has, or a contradiction, is a problem and not silence."""
    (tmp_path / "a.toml").write_text(f"[plugins]\n{line}\n")
    result = call("check", "a.toml")
    assert result.exit_code == 2
    assert words in result.stderr
    assert "a.toml" in result.stderr or "plugins.require" in result.stderr


def test_right_names_in_plugins_pass(call, tmp_path: Path) -> None:
    """Plugins, hooks and distributions that are there may be disabled, required and pinned."""
    (tmp_path / "a.toml").write_text(
        '[plugins]\ndisable = ["checkpoint"]\nrequire = ["powertrain-cpu>=0.1", "comm"]\n'
        'pin = { make_runner = "cpu", cpu = "powertrain-cpu" }\n'
    )
    result = call("check", "a.toml")
    assert result.exit_code == 0, result.stderr


def test_check_refuses_what_the_variable_does_not_allow(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section whose plugin POWERTRAIN_PLUGINS leaves out is refused, as the run would refuse it."""
    (tmp_path / "a.toml").write_text("[comm]\n")
    monkeypatch.setenv("POWERTRAIN_PLUGINS", "none")
    result = call("check", "a.toml")
    assert result.exit_code == 2
    assert "needs plugin 'comm', which POWERTRAIN_PLUGINS does not allow" in result.stderr


def test_check_speaks_json(call, tmp_path: Path) -> None:
    """--json lists each file with its problems, on standard output alone."""
    (tmp_path / "a.toml").write_text("[run]\nsede = 2\n")
    (tmp_path / "b.toml").write_text("")
    result = call("check", "a.toml", "b.toml", "--json")
    assert (result.exit_code, result.stderr) == (2, "")
    bad, good = json.loads(result.stdout)
    assert good == {"file": "b.toml", "ok": True, "problems": []}
    assert bad["problems"] == [
        {"path": "run.sede", "message": "unknown key", "where": "a.toml:2:1", "suggestion": "run.seed"}
    ]


def test_show_says_where_each_value_comes_from(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--origin names file, variable, --set, default, and what a value is derived from."""
    (tmp_path / "a.toml").write_text("[batch]\nmicro = 2\n")
    monkeypatch.setenv("POWERTRAIN__RUN__SEED", "7")
    result = call("show", "a.toml", "--origin", "--ranks", "4", "--set", "optimizer.lr=0.5")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines()}
    assert rows["run.seed"] == "7 POWERTRAIN__RUN__SEED"
    assert rows["batch.micro"] == "2 a.toml:2:1"
    assert rows["batch.total"] == "8 derived from batch.micro x 4 ranks"
    assert rows["optimizer.lr"] == "0.5 --set optimizer.lr"
    assert rows["checkpoint.every"] == "absent default"


OPEN = ("--set", "optimizer.name=some.where.Optimizer", "--set", "optimizer.beta=inf")


def test_show_writes_json_and_toml(call, tmp_path: Path) -> None:
    """--json is the nested values, or each with its origin; --toml reads back."""
    values = json.loads(call("show", "--json").stdout)
    assert values["optimizer"]["betas"] == [0.9, 0.999]
    origins = json.loads(call("show", "--json", "--origin", *OPEN).stdout)
    assert origins["optimizer.beta"] == {"value": "inf", "origin": "--set optimizer.beta"}
    text = call("show", "--toml").stdout
    assert tomli.loads(text)["batch"] == {"micro": 1, "accumulation": 1, "total": 1}
    (tmp_path / "again.toml").write_text(text)
    assert call("check", "again.toml").exit_code == 0
    assert call("show", "--toml", "--json").exit_code == 2


def test_schema_explains_keys(call) -> None:
    """schema lists all keys, those of one section, or explains one."""
    assert "precision.compute" in call("schema").stdout
    section = call("schema", "batch").stdout
    assert "batch.total" in section
    assert "precision" not in section
    one = call("schema", "checkpoint.every").stdout
    assert one.startswith("checkpoint.every\n  takes: an integer >= 1\n  default: absent\n  Optimizer steps between")
    assert json.loads(call("schema", "--json").stdout)["properties"]["batch"]["additionalProperties"] is False
    assert json.loads(call("schema", "batch", "--json").stdout)["properties"]["micro"]["minimum"] == 1
    assert json.loads(call("schema", "batch.micro", "--json").stdout)["minimum"] == 1


@pytest.mark.parametrize(("what", "hint"), [("batc", "batch"), ("batch.mico", "batch.micro")])
def test_schema_suggests(call, what: str, hint: str) -> None:
    """A section or key that does not exist is a usage error with the nearest one."""
    result = call("schema", what)
    assert result.exit_code == 2
    assert f"did you mean {hint}?" in result.stderr


def test_init_writes_a_file_that_passes(call, tmp_path: Path) -> None:
    """init writes train.toml, refuses to write it twice without --force, and check passes it unchanged."""
    assert call("init").exit_code == 0
    assert call("check", "train.toml").stdout == "train.toml: ok\n"
    (tmp_path / "train.toml").write_text("mine")
    result = call("init")
    assert (result.exit_code, (tmp_path / "train.toml").read_text()) == (2, "mine")
    assert "--force overwrites it" in result.stderr
    assert call("init", "--force").exit_code == 0
    assert call("check", "train.toml").exit_code == 0


def test_init_writes_sections_of_plugins(call, tmp_path: Path) -> None:
    """--plugins adds their sections; one that is not installed is a usage error that says how to install it."""
    assert call("init", "a.toml", "--plugins", "cpu").exit_code == 0
    assert "\n[cpu]\n" in (tmp_path / "a.toml").read_text()
    assert call("check", "a.toml").exit_code == 0
    result = call("init", "b.toml", "--plugins", "nowhere")
    assert result.exit_code == 2
    assert "pip install powertrain-nowhere" in result.stderr
    assert not (tmp_path / "b.toml").exists()


def test_check_needs_no_torch(tmp_path: Path) -> None:
    """Checking a file imports neither torch nor rich."""
    (tmp_path / "a.toml").write_text("[batch]\nmicro = 2\n[comm]\n")
    code = (
        "import sys; from powertrain.cli.config import config;"
        "config(['check', sys.argv[1]], standalone_mode=False);"
        "print(sorted({'torch', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.toml")], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]"
