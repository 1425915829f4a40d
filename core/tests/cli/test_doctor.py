"""`powertrain doctor`: always finishes, always exits with 0, always tells everything."""

from __future__ import annotations

import json
import os
import sys

import pytest

from powertrain.cli.probes import machine

AREAS = {
    "versions", "system", "accelerators", "collectives", "compiler",
    "disk", "kernels", "network", "environment", "plugins",
}  # fmt: skip

ACCELERATOR = """
import os, time
from powertrain.plugin import Plugin, Probe

class ThePlugin(Plugin):
    name, api = {name!r}, 1

    def is_available(self):
        BODY
"""


def accelerator(farm, name, body):
    """Install an accelerator plugin whose probe does ``body``."""
    farm.add(name, ACCELERATOR.replace("BODY", body), keywords="powertrain-plugin powertrain-accelerator")


def checked(done):
    """The checks of a JSON report, after its schema has been held."""
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {"powertrain", "summary", "checks"}
    assert set(document["summary"]) == {"ok", "warn", "fail"}
    assert sum(document["summary"].values()) == len(document["checks"])
    for check in document["checks"]:
        assert set(check) == {"area", "name", "status", "found", "remedy"}
        assert all(isinstance(value, str) for value in check.values())
        assert check["status"] in ("ok", "warn", "fail")
        assert bool(check["remedy"]) == (check["status"] != "ok"), check
    return {(check["area"], check["name"]): check for check in document["checks"]}


def test_report_covers_every_area(powertrain):
    """The JSON report has the documented shape and something from each area."""
    found = checked(powertrain("doctor", "--json", "--time-limit", "60"))
    assert {area for area, _ in found} == AREAS
    for fact in ("python", "torch", "powertrain"):
        assert found["versions", fact]["status"] == "ok"


def test_table_marks_and_remedies(powertrain, broken_farm):
    """The table has a mark for each check, and every one that is not ok is followed by what to do."""
    done = powertrain("doctor", "--time-limit", "60", farm=broken_farm)
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    bad = [line for line in lines if line.startswith(("warn ", "fail "))]
    assert len(bad) == len([line for line in lines if ": to fix: " in line]) >= 8
    assert "Traceback" not in done.stdout


def test_nothing_that_a_plugin_does_stops_it(powertrain, farm):
    """A probe that hangs, dies, drowns its output or raises is one failed check each."""
    accelerator(farm, "hangs", "time.sleep(1000)")
    accelerator(farm, "dies", "os.abort()")
    accelerator(farm, "prints", "print('x' * 100_000); return Probe(False, 'only noise')")
    accelerator(farm, "raises", "raise OSError('driver stub')")
    found = checked(powertrain("doctor", "--json", "--time-limit", "20", farm=farm))
    assert {area for area, _ in found} == AREAS
    assert "no answer within" in found["accelerators", "accelerator hangs"]["found"]
    assert "died: Abort" in found["accelerators", "accelerator dies"]["found"]
    assert found["accelerators", "prints"]["found"] == "not available: only noise"
    assert "driver stub" in found["accelerators", "accelerator raises"]["found"]


def test_poor_machine_gets_a_full_report(powertrain, tmp_path):
    """Without a compiler, a writable directory or sensible variables the report is still whole."""
    missing = tmp_path / "not there"
    variables = {"PATH": "/nowhere", "WORLD_SIZE": "2", "RANK": "7"}
    found = checked(powertrain("doctor", "--json", "--directory", str(missing), "--time-limit", "60", **variables))
    assert {area for area, _ in found} == AREAS
    assert found["compiler", "c++"]["status"] == "warn"
    assert found["compiler", "nvcc"]["status"] == "ok"
    assert found["environment", "launcher"]["status"] == "fail"
    assert any(check["status"] == "fail" for (area, _), check in found.items() if area == "disk")


def test_disk_test_leaves_nothing(tmp_path):
    """The disk's speed is measured with a file that is gone afterwards."""
    checks = {check.name: check for check in machine.disk(str(tmp_path))}
    assert "MB/s written" in checks["speed"].found
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_leftovers_of_ended_processes_are_found(tmp_path):
    """Files named for a process that is gone are listed with a remedy; those of a running one are not."""
    (tmp_path / "torch_4194305_1_0").write_bytes(b"x" * 2**20)
    (tmp_path / f"torch_{os.getpid()}_1_0").touch()
    (tmp_path / "someone_elses").touch()
    leftovers = {check.name: check for check in machine._shared_memory(tmp_path)}["leftovers"]
    assert leftovers.status == "warn"
    assert leftovers.found.startswith("1 files of ended processes, 1 MiB")
    assert leftovers.remedy == f"rm {tmp_path / 'torch_4194305_1_0'}"
