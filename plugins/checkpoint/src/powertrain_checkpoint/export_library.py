"""A checkpoint's model as a directory that model libraries load: shards, an index, and copied configuration."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from powertrain.errors import CheckpointError
from powertrain_checkpoint.directory import sync
from powertrain_checkpoint.export import Source
from powertrain_checkpoint.image import Entry
from powertrain_checkpoint.manifest import Manifest

CONFIG = "config.json"
_BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""What is copied beside the configuration, where it is there."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``5GB``, ``200MiB`` or ``1000``.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[KMGT]I?)B?", text.strip().upper())
    if match is None or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise ValueError(f"{text!r} is no size: write a number and B, kB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return size


def plan(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Spread tensors over files of at most ``limit`` bytes of data, in order; a larger tensor has a file of its own."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.nbytes
    return files


def export(
    directory: Path,
    manifest: Manifest,
    output: Path,
    dtype: str | None,
    progress: Callable[[int], None],
    *,
    limit: int,
    config: Path | None = None,
) -> list[Entry]:
    """Write the model of a checkpoint to the new directory ``output``, which appears only when it is whole.

    Args:
        directory: of the checkpoint.
        manifest: what it holds.
        output: the directory to write; it must not exist, or be empty.
        dtype: the safetensors code that floating-point tensors are converted to; None keeps theirs.
        progress: told the bytes read, after each tensor.
        limit: the largest size of one file's tensors in bytes.
        config: a configuration to copy: a file, or a directory that holds ``config.json``, with its tokenizer.

    Raises:
        CheckpointError: it holds no model, a file is damaged, or there is something at ``output``, or no configuration.
        OSError: the disk refused.
    """
    source = Source(directory, manifest, dtype)
    copies = _copies(config)
    _check_free(output)
    entries = source.entries()
    files = plan(entries, limit)
    draft = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        table: dict[str, str] = {}
        with source:
            for number, part in enumerate(files, 1):
                name = "model.safetensors"
                if len(files) > 1:
                    name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
                source.write(draft / name, part, progress)
                table.update({entry.key: name for entry in part})
        if len(files) > 1:
            index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": table}
            (draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for path, name in copies:
            shutil.copyfile(path, draft / name)
        sync(draft)
        draft.rename(output)  # takes the place of an empty directory
        sync(output.absolute().parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return entries


def _check_free(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CheckpointError(
            f"{output} is there already",
            where=str(output),
            expected="a new or an empty directory",
            remedy="give another OUTPUT, or remove it first; one file instead of a directory ends in .safetensors",
        )


def _copies(config: Path | None) -> list[tuple[Path, str]]:
    """Return what is copied, with the name that it gets."""
    if config is None:
        return []
    path = config / CONFIG if config.is_dir() else config
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError("there is no configuration to copy", where=str(path)) from None
    except ValueError as error:
        raise CheckpointError(f"the configuration is no JSON: {error}", where=str(path)) from error
    if not isinstance(content, dict):
        raise CheckpointError("the configuration is no JSON object", where=str(path), found=type(content).__name__)
    beside = [config / name for name in _BESIDE] if config.is_dir() else []
    return [(path, CONFIG), *((file, file.name) for file in beside if file.is_file())]
