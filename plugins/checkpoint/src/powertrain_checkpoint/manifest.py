"""The manifest: what a checkpoint holds and where, as JSON with a checksum of its own.

The file is one JSON object whose second member is the checkpoint and whose
first is the CRC-32 of that member's bytes, so that any altered byte shows.
Its presence in a directory says that the checkpoint is complete.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from powertrain.errors import CheckpointError, ManifestMissing, ShardCorrupt

FILE_NAME = "manifest.json"
FORMAT = 1
"""The version of the format that is written; it is raised when an older reader would misread."""

BLOCK = 4 * 2**20
"""Bytes under one checksum; a partial read verifies only the blocks that it touches."""

_PREFIX = b'{"crc32":"%08x","checkpoint":'
_PREFIX_LENGTH = len(_PREFIX % 0)
_CREATED = re.compile(rb'"checkpoint":\{"format":\d+,"created":([0-9.e+]+),')


@attrs.frozen
class Chunk:
    """An axis-aligned block of a tensor, stored row-major in one piece.

    Attributes:
        offsets: its first index along each axis.
        sizes: its extent along each axis.
        file: which of the manifest's files holds it.
        start: its first byte in that file.
        checksums: the CRC-32 of each ``BLOCK`` bytes of it; the last block may be shorter.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: int
    start: int
    checksums: tuple[int, ...]


@attrs.frozen
class Tensor:
    """A tensor: its global shape, its element type (a safetensors code) and its chunks."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@attrs.frozen
class File:
    """A shard: its name, its size in bytes, and the size and CRC-32 of its header."""

    name: str
    size: int
    header_size: int
    header_checksum: int


@attrs.frozen(kw_only=True)
class Manifest:
    """Everything about a checkpoint but the tensors' bytes.

    Attributes:
        tag: the checkpoint's name.
        identity: a random name of the save that wrote it.
        created: seconds since 1970; later saves in one directory have larger values.
        version: the version of Powertrain that wrote it.
        world_size: how many ranks wrote it.
        files: the shards.
        tensors: the tensors by global name.
        values: JSON that all ranks shared.
        rank_values: JSON of each rank.
    """

    tag: str
    identity: str
    created: float
    version: str
    world_size: int
    files: tuple[File, ...]
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    rank_values: tuple[Mapping[str, Any], ...]

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        # ``created`` stands at the front: listing checkpoints reads no further.
        body = {"format": FORMAT, "created": self.created, **attrs.asdict(self)}
        text = json.dumps(body, separators=(",", ":")).encode()
        return _PREFIX % zlib.crc32(text) + text + b"}\n"


def parse(content: bytes, where: Path) -> Manifest:
    """Return the manifest in ``content``, which was read from ``where``.

    Raises:
        ShardCorrupt: it is not what was written.
        CheckpointError: a newer version of the format.
    """
    text = content[_PREFIX_LENGTH:-2]
    if content != _PREFIX % zlib.crc32(text) + text + b"}\n":
        raise ShardCorrupt(f"the manifest {where.name} does not match its own checksum", where=str(where))
    body = json.loads(text)
    if body["format"] > FORMAT:
        raise CheckpointError(
            f"the checkpoint was written in format {body['format']} by Powertrain {body['version']}",
            where=str(where),
            expected=f"format {FORMAT} or older",
            remedy="install that version of powertrain-checkpoint or a later one",
        )
    return Manifest(
        tag=body["tag"],
        identity=body["identity"],
        created=body["created"],
        version=body["version"],
        world_size=body["world_size"],
        files=tuple(File(**file) for file in body["files"]),
        tensors={name: _tensor(entry) for name, entry in body["tensors"].items()},
        values=body["values"],
        rank_values=tuple(body["rank_values"]),
    )


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    chunks = tuple(
        Chunk(tuple(c["offsets"]), tuple(c["sizes"]), c["file"], c["start"], tuple(c["checksums"]))
        for c in entry["chunks"]
    )
    return Tensor(tuple(entry["shape"]), entry["dtype"], chunks)


def load(directory: Path) -> Manifest:
    """Read the manifest of the checkpoint in ``directory``.

    Raises:
        ManifestMissing: there is none.
        ShardCorrupt: it was altered.
    """
    path = directory / FILE_NAME
    try:
        return parse(path.read_bytes(), path)
    except FileNotFoundError:
        raise ManifestMissing(
            f"{directory.name} has no {FILE_NAME}: its save never finished, or it is no checkpoint",
            where=str(directory),
        ) from None


def created(directory: Path) -> float:
    """Return when the checkpoint in ``directory`` was made, without reading all of its manifest.

    For an altered manifest this is when its file was last written.
    """
    path = directory / FILE_NAME
    with path.open("rb") as file:
        match = _CREATED.search(file.read(256))
    return float(match[1]) if match else path.stat().st_mtime
