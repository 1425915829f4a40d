"""Fixtures of the command line's tests: a farm of fake distributions, and the command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

GOOD = """
from powertrain.plugin import Plugin
from powertrain.hookspecs import hookimpl

class ThePlugin(Plugin):
    name, api, support = {name!r}, 1, "community"
"""


class Farm:
    """A directory of fake installed distributions, each with one entry point."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def add(
        self,
        name: str,
        source: str | None = GOOD,
        *,
        distribution: str | None = None,
        target: str = "ThePlugin",
        keywords: str = "powertrain-plugin",
    ) -> None:
        """Install plugin ``name`` whose module holds ``source``; None leaves the module out."""
        distribution = distribution or f"farm-{name}"
        module = distribution.replace("-", "_")
        if source is not None:
            (self.path / f"{module}.py").write_text(source.replace("{name!r}", repr(name)))
        info = self.path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
            f"Summary: Made for {name}.\nKeywords: {keywords}\n"
        )
        (info / "entry_points.txt").write_text(f"[powertrain.plugins]\n{name} = {module}:{target}\n")

    def add_dummy(self, index: int) -> None:
        """Install a distribution that has nothing to do with Powertrain."""
        info = self.path / f"dummy_{index}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dummy-{index}\nVersion: 1.0\n")


@pytest.fixture
def farm(tmp_path: Path) -> Farm:
    """An empty farm."""
    return Farm(tmp_path / "farm")


@pytest.fixture
def broken_farm(farm: Farm) -> Farm:
    """A farm in which everything that can be wrong with a plugin is wrong with one."""
    farm.add("good")
    farm.add("importerror", "import a_module_that_is_not_there")
    farm.add("syntaxerror", "class ThePlugin(:")
    farm.add("wrongtype", "ThePlugin = 42")
    farm.add("constructs", GOOD + "    def __init__(self, config):\n        raise RuntimeError('no such luck')\n")
    farm.add("stale", None)
    farm.add("newer", GOOD.replace("1, ", "99, "))
    farm.add("exits", "import sys\nsys.exit(3)")
    farm.add("twice", distribution="farm-one")
    farm.add("twice", distribution="farm-two")
    return farm


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """The environment without anything that would steer the command; temporary files lie below the test's own."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("POWERTRAIN", "PYTEST", "COV_", "NO_COLOR"))}
    return {**kept, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::ResourceWarning"}


@pytest.fixture
def powertrain(environ: dict[str, str], tmp_path: Path) -> Run:
    """Run ``powertrain`` with arguments in a process of its own."""

    def run(*arguments: str, farm: Farm | None = None, cwd: Path = tmp_path, **variables: str) -> object:
        env = {**environ, **variables}
        if farm is not None:
            env["PYTHONPATH"] = str(farm.path)
        command = [sys.executable, "-m", "powertrain.cli", *arguments]
        return subprocess.run(
            command,
            env=env,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return run  # type: ignore[return-value]
