"""One shape for every package, and one word in four places."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli

from powertrain.discovery import hooks_of, installed, load

ROOT = Path(__file__).parents[1]
ROLE_HOOKS = {
    "accelerator": "make_accelerator",
    "communicator": "make_communicator",
    "checkpoint": "make_checkpoint_store",
}


def manifests() -> list[Path]:
    """Return every pyproject.toml of the tree, except those of test material and of hidden or built directories."""
    found = []
    for directory, below, files in os.walk(ROOT):
        below[:] = sorted(d for d in below if not d.startswith(".") and d not in ("tests", "build", "dist", "runs"))
        if "pyproject.toml" in files:
            found.append(Path(directory) / "pyproject.toml")
    return found


def read(manifest: Path) -> dict[str, Any]:
    return tomli.loads(manifest.read_text(encoding="utf-8"))


PACKAGES = [manifest.parent for manifest in manifests() if manifest.parent != ROOT]
BESIDE = [package for package in PACKAGES if package != ROOT / "core"]
LIBRARIES = [ROOT / "plugins/accelerators/triton"]
PLUGINS = [package for package in BESIDE if package not in LIBRARIES]
of_packages = pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
of_libraries = pytest.mark.parametrize("package", LIBRARIES, ids=lambda path: path.name)
of_plugins = pytest.mark.parametrize("package", PLUGINS, ids=lambda path: path.name)


def test_there_are_packages() -> None:
    """The walk finds the core and the first plugins, so that the tests below test something."""
    assert {"core", "cpu", "cuda", "rocm", "comm", "checkpoint", "data"} <= {package.name for package in PACKAGES}


def test_every_package_is_installed_by_the_requirements() -> None:
    """One pip line installs the whole workspace: each package is an editable line of requirements.txt."""
    lines = re.findall(r"^-e (\S+?)(?:\[\w+\])?$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert {(ROOT / line).resolve() for line in lines} == {ROOT, *PACKAGES}


def test_the_workspace_has_every_package() -> None:
    """The root's uv workspace, extras and import contracts know each package."""
    root = read(ROOT / "pyproject.toml")
    members = {path for pattern in root["tool"]["uv"]["workspace"]["members"] for path in ROOT.glob(pattern)}
    assert {path for path in members if (path / "pyproject.toml").exists()} == set(PACKAGES)
    extras = root["project"]["optional-dependencies"]
    assert set(extras) == {package.name for package in PLUGINS} | {"all"}
    linter = root["tool"]["importlinter"]
    modules = {f"powertrain_{package.name}" for package in BESIDE}
    assert set(linter["root_packages"]) == modules | {"powertrain"}
    contracts = {contract["id"]: contract for contract in linter["contracts"]}
    assert set(contracts["independence"]["modules"]) == modules
    assert set(contracts["core"]["forbidden_modules"]) == modules
    assert set(contracts["public"]["source_modules"]) == modules


@of_packages
def test_packages_have_one_shape(package: Path) -> None:
    """Each package has a README of about a screen, typed source, tests, and no module beside its own."""
    (module,) = [path for path in (package / "src").iterdir() if path.suffix != ".egg-info"]
    assert (module / "__init__.py").read_text(encoding="utf-8").startswith('"""')
    assert (module / "py.typed").is_file()
    assert list((package / "tests").rglob("test_*.py"))
    assert not list((package / "tests").rglob("__init__.py"))
    readme = (package / "README.md").read_text(encoding="utf-8").splitlines()
    assert readme[0].startswith("# ")
    assert 5 <= len(readme) <= 80


@of_packages
def test_packages_move_in_lock_step(package: Path) -> None:
    """Versions, Python, licence and builder are the root's, and the core is required at that very version."""
    root, own = read(ROOT / "pyproject.toml")["project"], read(package / "pyproject.toml")
    project = own["project"]
    for key in ("version", "requires-python", "license"):
        assert project[key] == root[key]
    assert own["build-system"]["build-backend"] == "flit_core.buildapi"
    assert project["description"].endswith(".")
    assert project["keywords"]
    (module,) = [path for path in (package / "src").iterdir() if path.suffix != ".egg-info"]
    assert f'__version__ = "{root["version"]}"' in (module / "__init__.py").read_text(encoding="utf-8")
    if package in BESIDE:
        assert f"powertrain-core=={root['version']}" in project["dependencies"]


@of_plugins
def test_one_word_in_four_places(package: Path) -> None:
    """Distribution, import package, entry point and directory share the plugin's name, as its section does."""
    own, name = read(package / "pyproject.toml"), package.name
    project = own["project"]
    assert project["name"] == f"powertrain-{name}"
    assert own["tool"]["flit"]["module"]["name"] == f"powertrain_{name}"
    assert (package / "src" / f"powertrain_{name}").is_dir()
    (point,) = project["entry-points"]["powertrain.plugins"].items()
    assert point[0] == name
    assert point[1].startswith(f"powertrain_{name}.plugin:")
    assert load(name).name == name


@of_libraries
def test_libraries_offer_nothing_by_themselves(package: Path) -> None:
    """A library has its plugins' shape but no entry point, and plugins that require it in its very version."""
    own, name = read(package / "pyproject.toml"), package.name
    project = own["project"]
    assert project["name"] == f"powertrain-{name}"
    assert own["tool"]["flit"]["module"]["name"] == f"powertrain_{name}"
    assert "entry-points" not in project
    assert "powertrain-plugin" not in project["keywords"]
    line = f"{project['name']}=={project['version']}"
    users = {plugin.name for plugin in PLUGINS if line in read(plugin / "pyproject.toml")["project"]["dependencies"]}
    imports = re.compile(rf"^\s*(?:from|import) powertrain_{name}\b", re.MULTILINE)
    importers = {
        plugin.name
        for plugin in PLUGINS
        if any(imports.search(file.read_text(encoding="utf-8")) for file in (plugin / "src").rglob("*.py"))
    }
    assert users
    assert importers == users


@of_plugins
def test_declared_plugins_are_discovered(package: Path) -> None:
    """The registry finds each declared entry point with its distribution and version, and loads its class."""
    project = read(package / "pyproject.toml")["project"]
    entry = installed()[package.name]
    assert entry.target == project["entry-points"]["powertrain.plugins"][package.name]
    assert (entry.distribution, entry.version) == (project["name"], project["version"])
    assert entry.rivals == ()
    plugin = load(package.name)
    assert plugin.support == "first-party"
    assert (plugin.__doc__ or "").strip()


@of_plugins
def test_keywords_name_the_roles(package: Path) -> None:
    """A plugin's keywords say which roles it can fill, so that providers are found without an import."""
    words = set(read(package / "pyproject.toml")["project"]["keywords"])
    hooks = set(hooks_of(load(package.name)))
    assert "powertrain-plugin" in words
    assert {role for role in ROLE_HOOKS if f"powertrain-{role}" in words} == {
        role for role, hook in ROLE_HOOKS.items() if hook in hooks
    }


@pytest.mark.parametrize("package", BESIDE, ids=lambda path: path.name)
def test_packages_declare_what_they_import(package: Path) -> None:
    """Each third-party package that a package imports stands in its dependencies, or in an extra."""
    project = read(package / "pyproject.toml")["project"]
    extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
    declared = {re.split(r"[<>=~\[]", line)[0].replace("-", "_") for line in [*project["dependencies"], *extras]}
    text = "\n".join(file.read_text(encoding="utf-8") for file in (package / "src").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
    foreign = imported - set(sys.stdlib_module_names) - {"powertrain", f"powertrain_{package.name}"}
    assert foreign <= declared


def test_the_command_is_installed() -> None:
    """The console script ``powertrain`` answers with the version."""
    command = [sys.executable, "-m", "powertrain.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == f"powertrain {read(ROOT / 'pyproject.toml')['project']['version']}"
    scripts = read(ROOT / "core/pyproject.toml")["project"]["scripts"]
    assert scripts == {"powertrain": "powertrain.cli:main"}
