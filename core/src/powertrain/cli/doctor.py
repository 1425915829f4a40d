"""``powertrain doctor``: what is here, what is not, and what to do about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import click

from powertrain import __version__
from powertrain.cli.probes import PROBES, Check
from powertrain.discovery import installed

AT_ONCE = 2
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@click.option("--directory", type=click.Path(file_okay=False), help="Test the disk here; default: where you are.")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0.1),
    default=9.0,
    show_default=True,
    help="Seconds for all probes together.",
)
def doctor(as_json: bool, directory: str | None, time_limit: float) -> None:
    """Check this machine and installation.

    Every probe runs in a process of its own with a time limit, so this always
    finishes, and always with exit code 0: read the table, or the "summary" of
    --json. Include its output when you report a problem.
    """
    deadline = time.monotonic() + time_limit
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda probe: _ask(probe, deadline), _probes(directory)))
    checks = [check for answer in answers for check in answer]
    checks.sort(key=lambda check: check.area not in ("versions", "system"))  # what everyone asks for first
    if as_json:
        click.echo(json.dumps(_document(checks), indent=2))
    else:
        _table(checks)


def _probes(directory: str | None) -> list[tuple[str, ...]]:
    """Return the probes: the longest first, those that a foreign plugin could hold up last."""
    where = directory or (str(Path.cwd()) if os.access(".", os.W_OK) else tempfile.gettempdir())
    arguments = {"disk": [(where,)], "accelerator": [(name,) for name in _accelerators()]}
    return [(name, *given) for name in PROBES for given in arguments.get(name, [()])]


def _accelerators() -> list[str]:
    try:
        return [name for name, entry in installed().items() if "accelerator" in entry.roles]
    except Exception:  # unreadable metadata: the probe of the plugins tells
        return []


def _ask(probe: Sequence[str], deadline: float) -> list[Check]:
    """Run one probe in a process of its own; its death or silence is an answer too."""
    started = time.monotonic()
    label = " ".join(probe)
    _, area = PROBES[probe[0]]
    process = subprocess.Popen(
        [sys.executable, "-m", "powertrain.cli.probes", *probe],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that a probe's own children end with it
    )
    try:
        out, err = process.communicate(timeout=max(0.1, deadline - started))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        seconds = time.monotonic() - started
        remedy = "try again with --time-limit 60; if it stays silent, look at this part first"
        return [Check(area, label, "fail", f"no answer within {seconds:.1f} s", remedy)]
    try:
        return [Check(**row) for row in json.loads(out.strip().splitlines()[-1])]
    except (ValueError, TypeError, IndexError):
        last = (err.strip().splitlines() or ["it said nothing"])[-1]
        code = process.returncode
        ended = f"died: {signal.strsignal(-code)}" if code < 0 else f"exited with {code}"
        return [Check(area, label, "fail", f"the probe {ended}: {last}", "mend or uninstall what it looks at")]


def _document(checks: Sequence[Check]) -> dict[str, object]:
    summary = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")}
    return {"powertrain": __version__, "summary": summary, "checks": [attrs.asdict(check) for check in checks]}


def _table(checks: Sequence[Check]) -> None:
    from powertrain.cli.tables import echo_table

    echo_table(
        [(check.status, check.area, check.name, check.found) for check in checks],
        ["", "AREA", "CHECK", "FOUND"],
        STYLES,
    )
    wrong = [check for check in checks if check.status != "ok"]
    click.echo()
    for check in wrong:
        click.echo(f"{check.status}: {check.area}, {check.name}: to fix: {check.remedy}")
    click.echo(f"{len(checks)} checks, {len(wrong)} to look at." if wrong else f"{len(checks)} checks, all well.")
