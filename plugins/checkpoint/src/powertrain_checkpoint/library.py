"""Directories of safetensors as model libraries write them: found, checked by their headers, read by ranges.

::

    model.safetensors                      one file, or
    model-00001-of-00002.safetensors       several,
    model.safetensors.index.json           with an index that maps each name to its file

There are no checksums in them: what can be seen is whether headers are sound and files whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import attrs

from powertrain.errors import CheckpointError, CheckpointMissing, ShardCorrupt, ShardMissing, ShardTruncated
from powertrain_checkpoint import manifest
from powertrain_checkpoint.dtypes import SIZES

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_LARGEST_HEADER = 100 * 2**20


@attrs.frozen
class Place:
    """Where a tensor lies: its file, its type (a safetensors code), its shape, and its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


@attrs.frozen
class Library:
    """What a directory or a file of weights holds.

    Attributes:
        name: of the directory or file.
        places: every tensor by name.
        identity: a hash of all headers.
    """

    name: str
    places: Mapping[str, Place]
    identity: str


def load(path: Path) -> Library:
    """Find and check the weights at ``path``, a directory or a file.

    Raises:
        CheckpointMissing: there are none.
        ShardMissing: the index names a file that is not there.
        ShardTruncated: a file is shorter or longer than its header says.
        ShardCorrupt: a header or the index makes no sense.
    """
    files, index = _find(path)
    digest = hashlib.sha256()
    found: dict[str, Place] = {}
    for file in files:
        places, head = read_header(file)
        digest.update(head)
        found |= {name: place for name, place in places.items() if index is None or index.get(name) == file.name}
    lost = [name for name in index or {} if name not in found]
    if index is not None and lost:
        raise ShardCorrupt(
            f"the index says that {index[lost[0]]} holds {lost[0]}, which is not in it",
            where=str(path),
            found=f"{len(lost)} such names",
        )
    return Library(path.name, found, digest.hexdigest())


def _find(path: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """Return the files at a path, and the index if there is one."""
    if path.is_file():
        if path.name.endswith(INDEX_SUFFIX):
            return _indexed(path)
        return [path], None
    if not path.is_dir():
        raise CheckpointMissing(
            "there are no weights at this path",
            where=str(path),
            remedy="give a local directory or file; download a model of a hub into a directory first",
        )
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) == 1:
        return _indexed(indices[0])
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not indices and len(files) == 1:
        return files, None
    if (path / f"model{SUFFIX}").is_file():
        return [path / f"model{SUFFIX}"], None
    raise _nothing(path, [file.name for file in indices or files])


def _nothing(path: Path, candidates: list[str]) -> CheckpointMissing:
    remedy = "give the file or the index to read instead of the directory" if candidates else None
    if (path / manifest.FILE_NAME).is_file() or any(path.glob(f"*/{manifest.FILE_NAME}")):
        remedy = (
            "these are checkpoints of a run: engine.load_checkpoint continues from them, `powertrain export` converts"
        )
    elif any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        remedy = "convert them: model.save_pretrained(directory) of a recent transformers writes safetensors"
    return CheckpointMissing(
        "the directory holds several sets of weights" if candidates else "the directory holds no safetensors",
        where=str(path),
        expected=f"model{SUFFIX}, or model{INDEX_SUFFIX} and the files that it names",
        found=", ".join((candidates or sorted(file.name for file in path.iterdir()))[:10]) or "nothing",
        remedy=remedy or "give the directory that holds the model's files",
    )


def _indexed(path: Path) -> tuple[list[Path], Mapping[str, str]]:
    try:
        table: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
        names = sorted(set(table.values()))
        inside = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardCorrupt(f"the index {path.name} cannot be read: {error}", where=str(path)) from error
    if not inside:
        raise ShardCorrupt(f"the index {path.name} names files outside of its directory", where=str(path))
    for name in names:
        if not (path.parent / name).is_file():
            raise ShardMissing(f"the index lists {name}, which is not there", where=str(path.parent / name))
    return [path.parent / name for name in names], table


def read_header(path: Path) -> tuple[dict[str, Place], bytes]:
    """Return the tensors of a safetensors file, and the bytes of its header.

    Raises:
        ShardTruncated: the file is shorter or longer than its header says.
        ShardCorrupt: the header makes no sense.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise _truncated(path, "at least 8 bytes", size)
        if length > _LARGEST_HEADER:
            raise ShardCorrupt(
                f"{path.name} is no safetensors file: its header would have {length:,} bytes", where=str(path)
            )
        if size < 8 + length:
            raise _truncated(path, f"at least {8 + length:,} bytes", size)
        head = file.read(length)
    try:
        table = json.loads(head)
        entries = {name: entry for name, entry in table.items() if name != "__metadata__"}
        places = {name: _place(path, entry, 8 + length) for name, entry in entries.items()}
        ends = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardCorrupt(f"the header of {path.name} cannot be read: {error}", where=str(path)) from error
    end = 0
    for start, stop in ends:
        if start != end:
            raise ShardCorrupt(f"the header of {path.name} leaves a gap or overlaps at byte {end:,}", where=str(path))
        end = stop
    if size != 8 + length + end:
        raise _truncated(path, f"{8 + length + end:,} bytes", size)
    return places, head


def _place(path: Path, entry: Mapping[str, object], base: int) -> Place:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("an entry is of the wrong type")
    if dtype not in SIZES:
        raise CheckpointError(
            f"{path.name} holds tensors of type {dtype}", where=str(path), expected=", ".join(sorted(SIZES))
        )
    start, stop = offsets
    if stop - start != math.prod(shape) * SIZES[dtype] or min([start, *shape]) < 0:
        raise ValueError(f"{stop - start} bytes for shape {shape} of {dtype}")
    return Place(path, dtype, tuple(shape), base + start)


def _truncated(path: Path, expected: str, size: int) -> ShardTruncated:
    return ShardTruncated(
        f"{path.name} is not as long as its header says", where=str(path), expected=expected, found=f"{size:,} bytes"
    )


def read_range(descriptor: int, place: Place, start: int, view: memoryview) -> None:
    """Fill ``view`` with a tensor's bytes from its byte ``start``.

    Raises:
        ShardTruncated: the file ends before.
    """
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], place.start + start + done)
        if not count:
            raise ShardTruncated(f"{place.file.name} ends within a tensor", where=str(place.file))
        done += count
