"""A plan for people (a table, and bars) and for programs (JSON)."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from powertrain_zero.plan.changes import Change
    from powertrain_zero.plan.estimate import Need

CATEGORIES = (
    ("parameters", "parameters", "P", "blue"),
    ("gradients", "gradients", "G", "green"),
    ("optimizer", "optimizer", "O", "magenta"),
    ("gathered", "gathered units", "U", "cyan"),
    ("activations", "activations", "A", "yellow"),
    ("communication", "communication", "C", "red"),
    ("update", "update", "T", "white"),
    ("transfers", "transfers", "X", "bright_blue"),
)
"""The field of ``Need``, its name for people, its letter in a bar and its colour."""

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}  # fmt: skip
"""What a size may be written in."""

CELL = 10
"""Characters of a column with sizes."""

LABEL = 15
"""Characters of the column with names."""


def parse_size(text: str) -> int:
    """Return the bytes of ``24GB``, ``512MiB``, ``1.5 tb``.

    Raises:
        click.BadParameter: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factors = {name.lower(): factor for name, factor in UNITS.items()}
    factors |= {name[0].lower(): factor for name, factor in UNITS.items() if len(name) == 2}
    if match is None or match[2].lower() not in factors:
        raise click.BadParameter(f"{text!r} is no size; write 24GB, 512MiB, or `free` for what this machine has free")
    return int(float(match[1]) * factors[match[2].lower()])


def size(count: int | None) -> str:
    """Return bytes in the largest unit that leaves a number from 1 up; three digits."""
    if count is None:
        return "unknown"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB" if value >= 999.5 else f"{value:.3g} TB"


def as_dict(need: Need, fixed: int) -> dict[str, Any]:
    """Return a need as JSON holds it; sizes in bytes, an unknown one null."""
    values: dict[str, Any] = {name: getattr(need, name) for name, _, _, _ in CATEGORIES}
    values |= {
        "host": need.host,
        "disk": need.disk,
        "allocator": need.allocator,
        "birth": need.birth,
        "birth_whole": need.birth_whole,
    }
    return values | {"training": need.training, "peak": need.peak, "process_peak": need.peak + fixed}


def echo_needs(needs: Mapping[str, Need], fixed: int, limit: int | None) -> None:
    """Print a table of needs with a bar for each; narrow terminals get one column after the other.

    Args:
        needs: by column: ``config`` and the stages.
        fixed: bytes of the process itself, which are part of the peak; 0 on a device.
        limit: bytes that are there.
    """
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    width = console.width
    per_line = max(1, (width - LABEL) // CELL)
    columns = list(needs)
    for start in range(0, len(columns), per_line):
        part = columns[start : start + per_line]
        _table(console, {name: needs[name] for name in part}, fixed, limit)
        console.print()
    _bars(console, needs, fixed, limit, width)


def _table(console: Any, needs: Mapping[str, Need], fixed: int, limit: int | None) -> None:
    from rich.text import Text

    def line(label: str, cells: Sequence[str], styles: Sequence[str], style: str = "") -> None:
        text = Text(label.ljust(LABEL), style=style)
        for cell, own in zip(cells, styles, strict=True):
            text.append(cell.rjust(CELL), style=own)
        text.rstrip()
        console.print(text)

    plain = [""] * len(needs)
    line("per rank", [name if name == "config" else f"stage {name}" for name in needs], ["bold"] * len(needs), "bold")
    for name, label, _, colour in CATEGORIES:
        if name == "transfers" and not any(need.transfers for need in needs.values()):
            continue
        line(label, [size(getattr(need, name)) for need in needs.values()], plain, colour)
    line("peak at birth", [size(need.birth) for need in needs.values()], plain)
    if fixed:
        line("allocator", [size(need.allocator) for need in needs.values()], plain)
        line("the process", [size(fixed)] * len(needs), plain)
    for name, label in (("host", "on the host"), ("disk", "on disks")):
        if any(getattr(need, name) for need in needs.values()):
            line(label, [size(getattr(need, name)) for need in needs.values()], plain)
    over = ["bold red" if limit is not None and need.peak + fixed > limit else "bold" for need in needs.values()]
    line("peak", [_marked(need) + size(need.peak + fixed) for need in needs.values()], over, "bold")


def _marked(need: Need) -> str:
    return "≥ " if need.activations is None else ""


def _bars(console: Any, needs: Mapping[str, Need], fixed: int, limit: int | None, width: int) -> None:
    """Draw each need as one bar of its categories, by letters, so that colours are not needed."""
    from rich.text import Text

    room = max(10, width - 8 - 11)
    longest = max([need.peak + fixed for need in needs.values()] + ([limit] if limit is not None else [])) or 1
    for name, need in needs.items():
        bar = Text((name if name == "config" else f"stage {name}").ljust(8))
        used = 0
        for field, _, letter, colour in (*CATEGORIES, ("fixed", "", ".", "dim")):
            value = fixed + need.allocator if field == "fixed" else getattr(need, field) or 0
            if field == "update":
                value = max(0, need.update - need.gathered - (need.activations or 0))
            cells = round(value / longest * room)
            bar.append(letter * cells, style=colour)
            used += cells
        if limit is not None and need.peak + fixed > limit:
            bar.append(" ").append("too much", style="bold red")
        else:
            bar.append(f" {size(need.peak + fixed)}")
        console.print(bar)
    shown = [item for item in CATEGORIES if item[0] != "transfers" or any(need.transfers for need in needs.values())]
    letters = ", ".join(f"{letter} {label}" for _, label, letter, _ in shown)
    console.print(Text(letters + (", . the process and its allocator" if fixed else ""), style="dim"), soft_wrap=False)


def echo_changes(changes: Sequence[Change], fixed: int, limit: int, peak: int) -> None:
    """Say that it does not fit, and what would."""
    click.echo(f"\nThis cannot fit: {size(peak)} a rank are needed, {size(limit)} are there.")
    if not changes:
        click.echo("No higher stage, smaller micro-batch, bf16 or more ranks would make it fit.")
        click.echo("What is left: [offload], [recompute], a shorter --sequence, a smaller model.")
        return
    click.echo("What would fit, the cheapest change first:")
    for change in changes:
        click.echo(f"  {'; '.join(change.steps)}: {size(change.need.peak + fixed)}")
