"""The ``powertrain`` command.

Each subcommand is a module that is imported when it is called. None of this
imports torch before a command needs it.
"""

from __future__ import annotations


def main() -> None:
    """Run the ``powertrain`` command and exit with its code."""
    from powertrain.cli.root import cli

    cli.main(prog_name="powertrain")
