"""Tables for people: as wide as the terminal, plain and unwrapped in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

import click

MIN_COLUMN = 12
"""Characters that a column needs on average to be readable."""


def echo_table(rows: Iterable[Sequence[str]], headers: Sequence[str], styles: Mapping[str, str] | None = None) -> None:
    """Print a table on standard output.

    A terminal gets cells folded to its width and colours (unless NO_COLOR is
    set), or one record below the other where it is too narrow for columns.
    Anything else gets one line a row, so that ``grep`` sees whole rows.

    Args:
        rows: the cells of each row.
        headers: the columns' names.
        styles: rich style by the exact text of a cell.
    """
    lines = [list(row) for row in rows]
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
        for line in [headers, *lines]:
            click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    cells = [[Text(cell, style=(styles or {}).get(cell, "")) for cell in line] for line in lines]
    for row in cells:
        table.add_row(*row)
    console = Console(file=sys.stdout)
    if console.width >= MIN_COLUMN * len(headers):
        console.print(table)
        return
    for first, *others in cells:
        console.print(first)
        for header, cell in zip(headers[1:], others, strict=True):
            console.print(Text(f"  {header.lower()}: ").append_text(cell))
