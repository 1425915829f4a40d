"""What a sweep found, for people (a table like a heat map, for each engine) and for programs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import click

from powertrain_offload.io.sizes import show_size
from powertrain_offload.io.sweep import Choice, Speed

if TYPE_CHECKING:
    from rich.table import Table

HEAT = ("on grey15", "on dark_blue", "on purple4", "on dark_magenta", "on dark_red", "on dark_orange3")
"""From slow to fast."""


@attrs.frozen
class Report:
    """Everything.

    Attributes:
        place: what was measured.
        size: of the file, in bytes.
        rounds: how often.
        found: the speed of each choice.
        raw: the disk's own, by the name of the way.
        tool: fio's version, or empty.
        refused: engines that do not work here, and why.
        buffered: why transfers go through the page cache; empty where they do not.
    """

    place: str
    size: int
    rounds: int
    found: Mapping[Choice, Speed]
    raw: Mapping[str, Speed]
    tool: str
    refused: Mapping[str, str]
    buffered: str

    @property
    def best(self) -> Choice:
        """The choice that reads and writes everything in the least time."""
        return max(self.found, key=lambda choice: self.found[choice].both)

    def values(self) -> dict[str, str | int]:
        """Return the keys of ``[offload]``."""
        best = self.best
        return {"engine": best.engine, "block": best.block, "depth": best.depth, "threads": best.threads}

    def limit(self, doing: str) -> tuple[float, str]:
        """Return the disk's own speed in bytes a second, and how it was reached; ``doing``: "read" or "write"."""
        return max(((getattr(speed, doing), name) for name, speed in self.raw.items()), default=(0.0, ""))

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON holds it; GB/s are billions of bytes a second."""
        best = self.found[self.best]
        (read, read_by), (write, write_by) = self.limit("read"), self.limit("write")
        return {
            "path": self.place,
            "size": self.size,
            "rounds": self.rounds,
            "direct": not self.buffered,
            "settings": [
                {"engine": c.engine, "block": c.block, "depth": c.depth, "threads": c.threads,
                 "read_GBps": giga(s.read), "write_GBps": giga(s.write)}
                for c, s in self.found.items()
            ],
            "best": {**self.values(), "read_GBps": giga(best.read), "write_GBps": giga(best.write)},
            "raw": {
                "tool": self.tool or None, "read_GBps": giga(read), "read_by": read_by,
                "write_GBps": giga(write), "write_by": write_by,
            },
            "ratio": {"read": ratio(best.read, read), "write": ratio(best.write, write)},
            "refused": dict(self.refused),
        }  # fmt: skip


def giga(speed: float) -> float:
    """Return GB/s."""
    return round(speed / 1e9, 3)


def ratio(ours: float, limit: float) -> float | None:
    """Return how much of the limit was reached; None where there is no limit."""
    return round(ours / limit, 3) if limit else None


def echo(report: Report) -> None:
    """Print it on standard output: in colour on a terminal, a line a setting in a pipe."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(file=sys.stdout)
        for engine in dict.fromkeys(choice.engine for choice in report.found):
            console.print(heat_map(report.found, engine, report.best))
    else:
        head = ("ENGINE", "BLOCK", "AT ONCE", "READ GB/S", "WRITE GB/S", "")
        _columns([head, *[_row(report, choice) for choice in report.found]])
    for line in summary(report):
        click.echo(line)


def _row(report: Report, choice: Choice) -> tuple[str, ...]:
    speed = report.found[choice]
    numbers = (f"{speed.read / 1e9:.2f}", f"{speed.write / 1e9:.2f}")
    return (choice.engine, show_size(choice.block), str(choice.at_once), *numbers, "best" * (choice == report.best))


def _columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def heat_map(found: Mapping[Choice, Speed], engine: str, best: Choice | None) -> Table:
    """Return one engine's table: a row a block size, a column for how much is under way, "read / write" in GB/s."""
    from rich.table import Table
    from rich.text import Text

    tried = [choice for choice in found if choice.engine == engine]
    columns = list(dict.fromkeys(choice.at_once for choice in tried))
    under = "depth" if engine == "uring" else "threads"
    table = Table(title=f"{engine}: read / write GB/s", title_justify="left", header_style="bold")
    table.add_column("block", justify="right")
    for column in columns:
        table.add_column(f"{under} {column}", justify="center")
    top = max((speed.both for speed in found.values()), default=0.0)
    for block in dict.fromkeys(choice.block for choice in tried):
        cells = []
        for column in columns:
            choice = Choice(engine, block, column)
            speed = found.get(choice)
            if speed is None or not speed.both:
                cells.append(Text("-" if speed is None else "…", style="dim"))
                continue
            mark = " ★" if choice == best else ""
            heat = HEAT[min(int(speed.both / top * len(HEAT)), len(HEAT) - 1)]
            style = f"bold white {heat}" if mark else f"white {heat}"
            cells.append(Text(f" {speed.read / 1e9:.2f} / {speed.write / 1e9:.2f}{mark} ", style=style))
        table.add_row(show_size(block), *cells)
    return table


def summary(report: Report) -> list[str]:
    """Return the lines below the tables."""
    best = report.best
    speed = report.found[best]
    under = f"depth {best.depth}" if best.engine == "uring" else f"{best.threads} threads"
    numbers = f"reads {speed.read / 1e9:.2f} GB/s, writes {speed.write / 1e9:.2f} GB/s"
    result = [f"best: {best.engine}, blocks of {show_size(best.block)}, {under}: {numbers}"]
    for doing in ("read", "write"):
        limit, name = report.limit(doing)
        if limit:
            share = getattr(speed, doing) / limit
            result.append(f"{doing}: {share:.2f} of the disk's own speed, {limit / 1e9:.2f} GB/s ({name})")
    if not report.tool:
        result.append("note: fio is not installed: the disk's own speed is that of a plain loop of pread and pwrite")
    if report.buffered:
        result.append(f"note: transfers go through the page cache: {report.buffered}")
    result += [f"note: {engine} was left out: {reason}" for engine, reason in report.refused.items()]
    result.append(f"{report.rounds} rounds over {show_size(report.size)}; medians; writes include the sync")
    return result
