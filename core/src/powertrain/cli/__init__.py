"""The ``powertrain`` command.

Each subcommand is a module that is imported when it is called. None of this
imports torch before a command needs it.
"""

from __future__ import annotations


def main() -> None:
    """Run the ``powertrain`` command and exit with its code."""
    import io
    import sys

    from powertrain.cli.root import cli

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a sign shows a question mark
    cli.main(prog_name="powertrain")
