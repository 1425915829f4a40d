"""``powertrain plugins test NAME``: the conformance suite on an installed plugin."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import attrs
import click

from powertrain.errors import PluginError


@attrs.define
class RoleResult:
    """How the tests of one role ended.

    Attributes:
        role: the role.
        passed: how many passed.
        failed: how many failed.
        skipped: how many do not apply.
        failures: name and first line of each failure.
        reasons: why tests were skipped.
    """

    role: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = attrs.field(factory=list)
    reasons: list[str] = attrs.field(factory=list)


@click.command()
@click.argument("name")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Test it with another value in its table.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, for programs.")
@click.option("--verbose", "-v", is_flag=True, help="Also print pytest's own report.")
def test(name: str, settings: tuple[str, ...], as_json: bool, verbose: bool) -> int:
    """Run the conformance suite on the installed plugin NAME.

    Each role that the plugin fills is tested, and what every plugin must do.
    Exits with 1 if a test fails.
    """
    from powertrain.discovery import load

    load(name)
    if settings:  # a mistake in them is told here, and not by every test
        from powertrain.testing.suites import registry_of

        registry_of(name, settings)
    results, report, code = run_suites(name, settings)
    if verbose or code not in (0, 1) or not results:
        click.echo(report, err=True)
    if code not in (0, 1) or not results:
        raise PluginError(f"the suites of plugin {name!r} did not run to their end", found=f"pytest exited with {code}")
    if as_json:
        click.echo(json.dumps([attrs.asdict(result) for result in results], indent=2))
    else:
        _table(results)
    return 1 if any(result.failed for result in results) else 0


def run_suites(name: str, settings: Sequence[str] = ()) -> tuple[list[RoleResult], str, int]:
    """Run ``powertrain.testing.suites`` in a new process; return the results, pytest's report and exit code.

    Args:
        name: of the plugin.
        settings: "key=value" of keys of its table that have not their defaults.

    Raises:
        PluginError: pytest is not installed.
    """
    if importlib.util.find_spec("pytest") is None:
        raise PluginError(
            "the conformance suite needs pytest, which is not installed",
            remedy="pip install 'powertrain-core[testing]'",
        )
    with tempfile.TemporaryDirectory(prefix="powertrain-test-") as place:
        # A configuration of its own: nothing of the project that the user stands in applies.
        ini, report = Path(place, "pytest.ini"), Path(place, "report.xml")
        ini.write_text("[pytest]\n")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "--pyargs", "powertrain.testing.suites", "--plugin", name),
                *(f"--plugin-set={setting}" for setting in settings),
                *("-p", "powertrain.testing.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:randomly"),
                *("-q", "-c", str(ini), "--rootdir", place, f"--junit-xml={report}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        results = read_report(report) if report.exists() else []
    return results, done.stdout, done.returncode


def read_report(path: Path) -> list[RoleResult]:
    """Sum up a JUnit report by role."""
    from powertrain.testing import suites

    results: dict[str, RoleResult] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        suite = getattr(suites, case.get("classname", "").rpartition(".")[2], None)
        role = suite.role if suite is not None else "collection"
        result = results.setdefault(role, RoleResult(role))
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if problem is not None:
            result.failed += 1
            lines = problem.get("message", "").splitlines()
            result.failures.append(f"{case.get('name')}: {lines[0] if lines else ''}")
        elif skipped is not None:
            result.skipped += 1
            if (reason := skipped.get("message", "")) not in result.reasons:
                result.reasons.append(reason)
        else:
            result.passed += 1
    return list(results.values())


def _table(results: list[RoleResult]) -> None:
    from powertrain.cli.tables import echo_table

    rows = [[r.role, str(r.passed), str(r.failed), str(r.skipped), "; ".join(r.reasons) or "-"] for r in results]
    echo_table(rows, ["ROLE", "PASSED", "FAILED", "SKIPPED", "WHY SKIPPED"])
    for result in results:
        for failure in result.failures:
            click.echo(f"failed: {result.role}: {failure}")
