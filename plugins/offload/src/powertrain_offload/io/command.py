"""``powertrain io``: how fast a disk is, and with which settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack

import click

from powertrain_offload.io import paste, raw, sweep
from powertrain_offload.io.kinds import available
from powertrain_offload.io.report import Report, echo, heat_map
from powertrain_offload.io.scratch import scratch_file, scratch_memory
from powertrain_offload.io.sizes import parse_size, show_size
from powertrain_offload.io.sweep import Choice, Speed

LEAST = 64 << 20
"""Bytes of the smallest file whose speed means something."""


@click.group()
def io() -> None:
    """Measure disks for [offload]."""


def _size(_context: click.Context, _option: click.Parameter, text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if size < LEAST:
        raise click.BadParameter(f"{text!r} is too little to measure a disk by; at least {show_size(LEAST)}")
    return -(-size // sweep.CHUNK) * sweep.CHUNK


@io.command()
@click.argument("path", type=click.Path())
@click.option("--size", default="1GiB", callback=_size, metavar="SIZE", help="Of the file. Default: 1GiB.")
@click.option("--rounds", default=3, type=click.IntRange(1, 100), metavar="N", help="Medians of how many. Default: 3.")
@click.option("--write", "config", type=click.Path(), metavar="CONFIG", help="Set the best in this file's [offload].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def bench(path: str, size: int, rounds: int, config: str | None, as_json: bool) -> None:
    """Find the fastest way to move bytes to and from the disk of the directory PATH.

    Tries every engine with several block sizes and numbers of blocks under way on one file, which
    is gone afterwards, and compares the best with what fio reaches on the same file (if it is
    installed), past the page cache.
    """
    if config is not None:
        paste.check(config)
    report = _measured(path, size, rounds)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        echo(report)
    if config is not None:
        paste.write(config, "offload", report.values())
        click.echo(f"{config}: [offload] has the best settings", err=as_json)
    elif not as_json:
        click.echo(
            "\n".join(["", "To use it (or --write CONFIG.toml):", "", "[offload]", *paste.lines(report.values())])
        )


def _measured(place: str, size: int, rounds: int) -> Report:
    """Measure everything in turns, so that what else the machine does meets all alike."""
    known = available()
    kinds = [kind for kind, reason in known.items() if reason is None]
    tool = raw.tool()
    with ExitStack() as stack:
        path = stack.enter_context(scratch_file(place, size))
        buffered = _filled(path, size)
        memory = stack.enter_context(scratch_memory())
        tried = sweep.choices(kinds, len(memory.view))
        found = {choice: Speed() for choice in tried}
        others = {way: Speed() for way in raw.ways(tool)}
        advance = stack.enter_context(
            _progress(found, (2 * len(tried) * size // sweep.CHUNK + 2 * len(others)) * rounds)
        )
        for _ in range(rounds):
            for choice, speed in found.items():
                with choice.open() as engine:
                    written, read = sweep.timed(engine, path, memory.view, size, advance)
                speed.writes.append(written)
                speed.reads.append(read)
            for way, speed in others.items():
                for writes, seen in ((True, speed.writes), (False, speed.reads)):
                    result = raw.speed(tool, way, writes, path, size, memory)
                    if result is not None:
                        seen.append(result)
                    advance()
    return Report(
        place=place,
        size=size,
        rounds=rounds,
        found=found,
        raw={way.name: speed for way, speed in others.items() if speed.reads and speed.writes},
        tool=raw.version(tool) if tool else "",
        refused={kind: reason for kind, reason in known.items() if reason is not None},
        buffered=buffered,
    )


def _filled(path: str, size: int) -> str:
    """Fill the file, so that its blocks exist; return why that went through the page cache, or nothing."""
    data = memoryview(bytes(sweep.CHUNK))
    with Choice("threads", 1 << 20, 4).open() as engine, engine.open(path, "update") as file:
        file.resize(size)
        for at in range(0, size, sweep.CHUNK):
            file.write(at, data).wait()
        file.sync()
    working: str = next(kind for kind, reason in available().items() if reason is None)
    with Choice(working, 1 << 20, 1).open() as engine, engine.open(path, "read") as file:
        return file.why_buffered


class _progress:  # noqa: N801 (used like a function)
    """On a terminal, shows how far it is and the table so far; otherwise nothing."""

    def __init__(self, found: dict[Choice, Speed], steps: int) -> None:
        self._found = found
        self._steps = steps
        self._stack = ExitStack()

    def __enter__(self) -> Callable[[], None]:
        if not sys.stderr.isatty():
            return lambda: None
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        progress = Progress(TextColumn("measuring"), BarColumn(), TimeRemainingColumn())
        task = progress.add_task("", total=self._steps)
        engines = list(dict.fromkeys(choice.engine for choice in self._found))

        def picture() -> Group:
            tables = [heat_map(self._found, engine, None) for engine in engines]
            return Group(*tables, progress)

        live = Live(
            get_renderable=picture, console=Console(stderr=True), transient=True, refresh_per_second=2,
        )  # fmt: skip
        self._stack.enter_context(live)
        return lambda: progress.advance(task)

    def __exit__(self, *_: object) -> None:
        self._stack.close()
