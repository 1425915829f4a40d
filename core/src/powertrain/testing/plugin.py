"""What every plugin must do, whatever its role, as a class of tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import attrs

from powertrain.discovery import hooks_of
from powertrain.plugin import API, Plugin, Probe
from powertrain.testing.plugin_facts import facts

CHILD = """
import importlib, json, sys
module, name = sys.argv[1:]
plugin = importlib.import_module(module)
torch = "torch" in sys.modules
for part in name.split("."):
    plugin = getattr(plugin, part)
from powertrain.testing.plugin_facts import facts
print(json.dumps({"torch": torch, "facts": facts(plugin)}))
"""


class PluginContract:
    """Tests of one plugin class."""

    def plugin(self) -> type[Plugin[Any]]:
        """Return the class that the entry point names."""
        raise NotImplementedError

    def in_child(self) -> dict[str, Any]:
        """Import and register the plugin in a new process; return what was seen there."""
        plugin = self.plugin()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, plugin.__module__, plugin.__qualname__],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return seen

    def test_has_a_name(self) -> None:
        """The name can be a section of a TOML file: a word in lower case."""
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", self.plugin().name)

    def test_is_written_for_a_served_api(self) -> None:
        """It declares the plugin API it was written for, and this core serves it."""
        assert self.plugin().api in {API, API - 1} - {0}

    def test_its_table_has_defaults(self) -> None:
        """Its table is an attrs class that may be left empty."""
        table = self.plugin().Config
        assert attrs.has(table)
        assert table() == table()

    def test_implements_a_hook(self) -> None:
        """It has at least one hook, and each matches its specification."""
        plugin = self.plugin()
        assert hooks_of(plugin)
        assert facts(plugin)["registered"] == [plugin.name]

    def test_registers_twice_alike(self) -> None:
        """Registering it again, as a second engine does, gives the same result."""
        plugin = self.plugin()
        assert facts(plugin) == facts(plugin)

    def test_registers_alike_in_another_process(self) -> None:
        """A new process, as every rank is one, sees the same name, hooks and defaults."""
        assert self.in_child()["facts"] == json.loads(json.dumps(facts(self.plugin())))

    def test_imports_no_torch(self) -> None:
        """Importing the module that the entry point names does not import torch."""
        assert not self.in_child()["torch"], f"{self.plugin().__module__} imports torch"

    def test_says_whether_it_is_available(self) -> None:
        """``is_available`` answers with a Probe that gives a reason."""
        plugin = self.plugin()
        probe = plugin(plugin.Config()).is_available()
        assert isinstance(probe, Probe)
        assert probe.reason
