"""``powertrain export``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from powertrain.errors import CheckpointError
from powertrain_checkpoint import directory, manifest
from powertrain_checkpoint.export import PREFIX
from powertrain_checkpoint.export import export as write_model

_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@click.command()
@click.argument("checkpoints", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--tag", help="Which checkpoint; the newest complete one when left out.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="Convert floating-point tensors; default: as saved.")
@click.option("--list", "listing", is_flag=True, help="List the complete checkpoints instead.")
def export(checkpoints: Path, output: Path | None, tag: str | None, dtype: str | None, listing: bool) -> None:
    """Write a checkpoint's model as one safetensors file.

    CHECKPOINTS is the directory of the checkpoints, or that of a single one.
    OUTPUT is the file to write. Tensors are streamed: memory for the largest is enough.
    """
    root = checkpoints
    if (checkpoints / manifest.FILE_NAME).is_file():
        root, own = checkpoints.absolute().parent, checkpoints.absolute().name
        if tag not in (None, own):
            raise click.UsageError(f"{checkpoints} is itself the checkpoint {own!r}; leave --tag out.")
        tag = own
    if listing:
        if output is not None:
            raise click.UsageError("--list writes no file; leave OUTPUT out.")
        _list(root)
        return
    if output is None:
        raise click.UsageError("Missing argument 'OUTPUT': the file to write, for example model.safetensors.")
    path = root / directory.choose(root, tag)
    found = manifest.load(path)
    total = sum(_nbytes(tensor) for name, tensor in found.tensors.items() if name.startswith(PREFIX))
    with _progress(f"{path.name} → {output.name}", total) as advance:
        entries = write_model(path, found, output, _DTYPES[dtype] if dtype else None, advance)
    size = sum(entry.nbytes for entry in entries)
    click.echo(f"{output}: {len(entries)} tensors, {_size(size)}, from {path.name}")


def _list(root: Path) -> None:
    from powertrain.cli.tables import echo_table

    tags = directory.complete(root)
    if not tags:
        directory.choose(root, None)
    echo_table([_row(root / tag) for tag in tags], ["tag", "step", "saved", "size", "tensors", "ranks"])


def _row(path: Path) -> list[str]:
    try:
        found = manifest.load(path)
    except CheckpointError as error:
        return [path.name, "", "", "", "", error.message]
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.created))
    size = _size(sum(file.size for file in found.files))
    step = str(found.values.get("step", ""))
    return [path.name, step, saved, size, str(len(found.tensors)), str(found.world_size)]


def _nbytes(tensor: manifest.Tensor) -> int:
    from powertrain_checkpoint.shard import Entry

    return Entry("", tensor.dtype, tensor.shape).nbytes


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many bytes were done; a bar shows them on a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress
    from rich.console import Console

    columns: list[progress.ProgressColumn] = [
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    ]
    with progress.Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
