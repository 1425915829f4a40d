"""The contract of every plugin, and the command that runs it."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from powertrain.cli import plugin_test
from powertrain.errors import PluginError
from powertrain.testing.plugin import PluginContract

HEALTHY = '''
from __future__ import annotations
import attrs
from powertrain import Plugin, Probe, hookimpl

@attrs.frozen(kw_only=True)
class Table:
    size: int = 3

class Sample(Plugin[Table]):
    name, api = "sample", 1

    @hookimpl
    def on_close(self, engine):
        """Do nothing."""
'''

FAULTS = {
    "imports torch": ("import attrs\n", "import attrs\nimport torch\n", "test_imports_no_torch"),
    "changes when asked again": (
        "    size: int = 3",
        "    size: int = attrs.field(factory=__import__('itertools').count().__next__)",
        "test_registers_twice_alike",
    ),
    "differs between processes": (
        "    size: int = 3",
        "    size: int = attrs.field(factory=__import__('os').getpid)",
        "test_registers_alike_in_another_process",
    ),
    "needs a setting": ("    size: int = 3", "    size: int", "test_its_table_has_defaults"),
    "misspells its hook": ("def on_close(", "def on_closed(", "test_implements_a_hook"),
    "misses its argument": ("(self, engine)", "(self, motor)", "test_implements_a_hook"),
    "has no hook": ("    @hookimpl\n", "", "test_implements_a_hook"),
    "declares no API": ('name, api = "sample", 1', 'name = "sample"', "test_is_written_for_a_served_api"),
    "has a name with a blank": ('"sample"', '"a sample"', "test_has_a_name"),
    "gives no reason": (
        "    @hookimpl\n",
        '    def is_available(self):\n        return Probe(False, "")\n\n    @hookimpl\n',
        "test_says_whether_it_is_available",
    ),
}


@pytest.fixture
def suite_of(tmp_path, monkeypatch):
    """Write a plugin module that child processes can import too, and return its suite."""
    written = []

    def make(source):
        name = f"sample_plugin_{abs(hash(source))}"
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        written.append(name)
        spec.loader.exec_module(module)

        class Suite(PluginContract):
            def plugin(self):
                return module.Sample

        return Suite

    yield make
    for name in written:
        del sys.modules[name]


def test_a_healthy_plugin_passes(contract, suite_of):
    """A plugin without a fault fails no test."""
    assert contract.failures(suite_of(HEALTHY)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_caught(contract, suite_of, fault):
    """A plugin with one fault fails the test that is there for it."""
    old, new, test = FAULTS[fault]
    assert old in HEALTHY
    assert contract.failures(suite_of(HEALTHY.replace(old, new)), test), f"{test} passed"


def test_without_pytest_the_command_says_how_to_get_it(monkeypatch):
    """Where pytest is missing, the error names the extra that brings it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"pip install 'powertrain-core\[testing\]'") as caught:
        plugin_test.run_suites("cpu")
    assert caught.value.exit_code == 2


def test_a_report_is_summed_up_by_role(tmp_path):
    """Passed, failed and skipped tests are counted by role; failures keep their first line."""
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="powertrain.testing.suites.TestAccelerator" name="test_a"/>'
        '<testcase classname="powertrain.testing.suites.TestAccelerator" name="test_b">'
        '<failure message="first&#10;second"/></testcase>'
        '<testcase classname="powertrain.testing.suites.TestPlugin" name="test_c"><skipped message="why"/></testcase>'
        '<testcase classname="powertrain.testing.suites.TestPlugin" name="test_d"><error message="broke"/></testcase>'
        "</testsuite></testsuites>"
    )
    accelerator, plugin = plugin_test.read_report(report)
    assert (accelerator.role, accelerator.passed, accelerator.failed, accelerator.skipped) == ("accelerator", 1, 1, 0)
    assert accelerator.failures == ["test_b: first"]
    assert (plugin.role, plugin.passed, plugin.failed, plugin.skipped) == ("plugin", 0, 1, 1)
    assert plugin.reasons == ["why"]
