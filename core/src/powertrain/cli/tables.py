"""Tables for people: as wide as the terminal, plain and unwrapped in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import click


def echo_table(rows: Iterable[Sequence[str]], headers: Sequence[str], styles: Mapping[str, str] | None = None) -> None:
    """Print a table on standard output.

    A terminal gets cells folded to its width and colours (unless NO_COLOR is
    set); anything else gets one line a row, so that ``grep`` sees whole rows.

    Args:
        rows: the cells of each row.
        headers: the columns' names.
        styles: rich style by the exact text of a cell.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stdout = click.get_text_stream("stdout")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in row))
    if stdout.isatty():
        Console(file=stdout).print(table)
        return
    wide = Console(width=10_000, color_system=None)
    with wide.capture() as captured:
        wide.print(table)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
