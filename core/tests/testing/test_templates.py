"""``powertrain plugins new``: what it writes works as it is written."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from powertrain.cli.plugin_new import ROLES, new, write
from powertrain.errors import PluginConflict, PluginError
from powertrain.testing.checkpoint import CheckpointStoreContract


def run(*command, **variables):
    """Run a Python module in a new process."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A new plugin of each role, built and installed: the directory of their sources, and where they are installed."""
    folder = tmp_path_factory.mktemp("written")
    for role in ROLES:
        write(f"my-{role}", role, folder / role)
    flags = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    installed = run("pip", "install", *flags, "--target", folder / "site", *(folder / role for role in ROLES))
    assert installed.returncode == 0, installed.stderr
    return folder, folder / "site"


@pytest.mark.slow
@pytest.mark.parametrize("role", sorted(ROLES))
def test_the_template_builds_installs_and_conforms(written, role):
    """A new plugin of each role builds, installs and passes the conformance suite."""
    _, site = written
    suite = run("powertrain.cli", "plugins", "test", f"my-{role}", "--json", PYTHONPATH=str(site))
    assert suite.returncode == 0, suite.stdout + suite.stderr
    results = {result["role"]: result for result in json.loads(suite.stdout)}
    assert results.keys() == {"plugin", role}
    for result in results.values():
        assert result["passed"] > 5
        assert result["failed"] == 0


@pytest.mark.slow
def test_the_template_has_tests_of_its_own(written):
    """They hold the same contracts: that they are found is enough where there is nothing else in them."""
    source, site = written
    common = ("-q", "--import-mode=importlib", "--rootdir", source)
    found = run("pytest", "--collect-only", *common, *(source / role / "tests" for role in ROLES), PYTHONPATH=str(site))
    assert found.returncode == 0, found.stdout
    assert all(f"{role}/tests/" in found.stdout for role in ROLES)
    own = run("pytest", *common, source / "communicator" / "tests", PYTHONPATH=str(site))
    assert own.returncode == 0, own.stdout


def test_a_store_without_checksums_is_caught(tmp_path, monkeypatch, contract):
    """The template's store with its checksums switched off loads damaged bytes, and the contract sees it."""
    write("files", "checkpoint", tmp_path / "source")
    monkeypatch.syspath_prepend(str(tmp_path / "source" / "src"))
    module = importlib.import_module("powertrain_files.checkpoint")

    class Suite(CheckpointStoreContract):
        def make(self, directory, communicator):
            return module.FilesStore(directory, communicator)

    assert contract.failures(Suite, "test_damage_is_never_loaded") == []
    monkeypatch.setattr(module, "checksum", lambda data: "")
    assert contract.failures(Suite, "test_damage_is_never_loaded")


def test_the_command_writes_a_package(tmp_path, monkeypatch):
    """The command writes below the working directory and lists what it wrote."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(new, ["cool-device", "--role", "accelerator"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "powertrain-cool-device/src/powertrain_cool_device/plugin.py").is_file()
    assert "pip install -e 'powertrain-cool-device[test]'" in result.output
    for path in (tmp_path / "powertrain-cool-device").rglob("*"):
        if path.is_file():
            assert "$" not in path.read_text().replace("$ pip", "").replace("$ powertrain", "").replace("$ pytest", "")


@pytest.mark.parametrize("name", ["Cool", "1st", "a b", "a_b", "-x", "x-", "", "../up", "run", "checkpoint"])
def test_bad_names_are_refused(tmp_path, name):
    """A name that cannot be a section, or is the core's, is refused before anything is written."""
    with pytest.raises(PluginError, match="cannot be the name of a plugin"):
        write(name, "sampler", tmp_path / "place")
    assert not (tmp_path / "place").exists()


def test_a_taken_name_is_refused(tmp_path, monkeypatch):
    """A name that an installed plugin has is refused, with the distribution that has it."""
    from powertrain import discovery

    taken = discovery.Installed(
        name="taken",
        target="m:C",
        distribution="somebody",
        version="1",
        summary="",
        author="",
        roles=frozenset(),
    )
    monkeypatch.setattr(discovery, "installed", lambda: {"taken": taken})
    with pytest.raises(PluginConflict, match="by somebody"):
        write("taken", "sampler", tmp_path / "place")


def test_a_full_directory_is_refused(tmp_path):
    """Nothing is written over files that are there."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(PluginError, match="not empty"):
        write("fresh", "sampler", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
