"""Runs one probe and prints its checks as JSON on the last line of standard output.

``python -m powertrain.cli.probes NAME [ARGUMENT]``
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

import attrs

from powertrain.cli.probes import PROBES, Check


def main(name: str, *arguments: str) -> None:
    """Run the probe called ``name``; what it raises becomes a failed check."""
    module, area = PROBES[name]
    checks = []
    try:
        probe = getattr(import_module(f"powertrain.cli.probes.{module}"), name)
        checks += list(probe(*arguments))
    except Exception as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())
        where = " ".join([name, *arguments])
        checks.append(Check(area, where, "fail", found, "see the message; POWERTRAIN_LOG=debug shows more"))
    sys.stdout.write("\n" + json.dumps([attrs.asdict(check) for check in checks]) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
