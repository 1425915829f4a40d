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
from powertrain_checkpoint.export import export as write_file
from powertrain_checkpoint.export_library import export as write_directory
from powertrain_checkpoint.export_library import parse_size
from powertrain_checkpoint.library import SUFFIX

_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@click.command()
@click.argument("checkpoints", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path), required=False)
@click.option("--tag", help="Which checkpoint; the newest complete one when left out.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="Convert floating-point tensors; default: as saved.")
@click.option("--hf", is_flag=True, help="Write a directory as Hugging Face libraries do, whatever OUTPUT is called.")
@click.option("--shard-size", metavar="SIZE", help="The largest file of such a directory; default 5GB.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True),
    help="A config.json to put into it, or a directory that has one; tokenizer files there come along.",
)
@click.option("--list", "listing", is_flag=True, help="List the complete checkpoints instead.")
def export(
    checkpoints: Path,
    output: Path | None,
    tag: str | None,
    dtype: str | None,
    hf: bool,
    shard_size: str | None,
    config: Path | None,
    listing: bool,
) -> None:
    """Write a checkpoint's model as safetensors: one file, or a directory that from_pretrained loads.

    CHECKPOINTS is the directory of the checkpoints, or that of a single one.
    OUTPUT is a file whose name ends in .safetensors, or else a new directory.
    Tensors are streamed: memory for the largest is enough.
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
        raise click.UsageError("Missing argument 'OUTPUT': what to write, model.safetensors or a directory.")
    as_directory = hf or output.suffix != SUFFIX
    if not as_directory and (shard_size or config):
        raise click.UsageError("--shard-size and --config are for a directory; add --hf, or leave them out.")
    if not as_directory and output.is_dir():
        raise click.UsageError(f"{output} is a directory; OUTPUT is to be a file, or add --hf.")
    try:
        limit = parse_size(shard_size or "5GB")
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--shard-size") from None
    path = root / directory.choose(root, tag)
    found = manifest.load(path)
    total = sum(_nbytes(tensor) for name, tensor in found.tensors.items() if name.startswith(PREFIX))
    code = _DTYPES[dtype] if dtype else None
    with _progress(f"{path.name} → {output.name}", total) as advance:
        if as_directory:
            entries = write_directory(path, found, output, code, advance, limit=limit, config=config)
        else:
            entries = write_file(path, found, output, code, advance)
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
    from powertrain_checkpoint.image import Entry

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
