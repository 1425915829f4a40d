"""A checkpoint's parameters as one safetensors file, or as a model library's directory, streamed tensor by tensor.

No engine and, unless element types change, no torch is needed. At any time
one tensor is held in memory, and one piece of a shard beside it.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from powertrain.errors import CheckpointError
from powertrain_checkpoint.dtypes import SIZES, to_torch
from powertrain_checkpoint.image import Entry, header
from powertrain_checkpoint.manifest import BLOCK, Chunk, Manifest, Tensor
from powertrain_checkpoint.shard import Shard, pieces

PREFIX = "model/"
"""What the names of parameters and buffers begin with in a checkpoint."""

_PIECE = 4 * BLOCK
_FLOATS = {"F64", "F32", "F16", "BF16"}
_OPEN_FILES = 64


def export(
    directory: Path, manifest: Manifest, output: Path, dtype: str | None, progress: Callable[[int], None]
) -> list[Entry]:
    """Write the model of a checkpoint to ``output``, which appears only when it is whole.

    Tied parameters are written once; the file's metadata maps their further
    names to the one that is written, as ``safetensors.torch.load_model`` expects.

    Args:
        directory: of the checkpoint.
        manifest: what it holds.
        output: the file to write; an older one is replaced.
        dtype: the safetensors code that floating-point tensors are converted to; None keeps theirs.
        progress: told the bytes read, after each tensor.

    Raises:
        CheckpointError: it holds no model, or a file is damaged.
        OSError: the disk refused.
    """
    source = Source(directory, manifest, dtype)
    entries = source.entries()
    draft = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        with source:
            source.write(draft, entries, progress)
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
    return entries


class Source:
    """The model in a checkpoint, from which files are written. Use it in a ``with`` block.

    Args:
        directory: of the checkpoint.
        manifest: what it holds.
        dtype: the safetensors code that floating-point tensors are converted to; None keeps theirs.

    Raises:
        CheckpointError: it holds no model.
    """

    def __init__(self, directory: Path, manifest: Manifest, dtype: str | None) -> None:
        self._model = {name.removeprefix(PREFIX): t for name, t in manifest.tensors.items() if name.startswith(PREFIX)}
        if not self._model:
            raise CheckpointError(
                f"checkpoint {manifest.tag} holds no model",
                where=str(directory),
                expected=f"tensors whose names begin with {PREFIX}",
                found=", ".join(list(manifest.tensors)[:5]) or "no tensor at all",
            )
        self._aliases: Mapping[str, str] = manifest.values.get("aliases", {})
        self._dtype = dtype
        self._shards = _Shards(directory, manifest)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self._shards.close()

    def entries(self) -> list[Entry]:
        """Return all tensors as they will be written, in the order of their names."""
        return [
            Entry(name, self._dtype if self._dtype and tensor.dtype in _FLOATS else tensor.dtype, tensor.shape)
            for name, tensor in sorted(self._model.items())
        ]

    def write(self, path: Path, entries: Sequence[Entry], progress: Callable[[int], None]) -> None:
        """Write a file of some of the tensors, and force it to the disk.

        Its metadata maps further names of tied parameters to the one that is written.
        """
        entries = sorted(entries, key=lambda entry: (-SIZES[entry.dtype], entry.key))
        names = {entry.key for entry in entries}
        aliases = {alias: name for alias, name in self._aliases.items() if name in names}
        with path.open("wb") as file:
            file.write(header(entries, {"format": "pt", **aliases}))
            for entry in entries:
                tensor = self._model[entry.key]
                file.write(_assemble(self._shards, tensor, entry.dtype))
                progress(math.prod(entry.shape) * SIZES[tensor.dtype])
            file.flush()
            os.fsync(file.fileno())


class _Shards:
    """A checkpoint's shards, opened when needed; the longest open is closed for another."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._open: dict[int, Shard] = {}
        self.buffer = bytearray(_PIECE + 2 * BLOCK)

    def close(self) -> None:
        for shard in self._open.values():
            shard.__exit__(None, None, None)

    def __getitem__(self, index: int) -> Shard:
        if index not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.pop(next(iter(self._open))).__exit__(None, None, None)
            self._open[index] = Shard(self._directory, self._manifest.files[index]).__enter__()
        return self._open[index]


def _assemble(shards: _Shards, tensor: Tensor, dtype: str) -> bytearray:
    """Return all bytes of a tensor, row-major, with elements of type ``dtype``."""
    size = SIZES[tensor.dtype]
    target = bytearray(math.prod(tensor.shape) * SIZES[dtype])
    with memoryview(target) as view:
        for chunk in tensor.chunks:
            length = math.prod(chunk.sizes) * size
            for start, stop in pieces(length, _PIECE):
                data = shards[chunk.file].read(chunk, length, start, stop, shards.buffer)
                if dtype != tensor.dtype:
                    data = _convert(data, tensor.dtype, dtype)
                _scatter(data, start // size, SIZES[dtype], chunk, tensor.shape, view)
    return target


def _convert(data: memoryview, source: str, target: str) -> memoryview:
    import torch

    from powertrain_checkpoint.memory import in_place

    (converted,) = in_place([torch.frombuffer(data, dtype=to_torch(source)).to(to_torch(target))])
    return converted


def _scatter(data: memoryview, first: int, size: int, chunk: Chunk, shape: tuple[int, ...], target: memoryview) -> None:
    """Put a chunk's elements, from its ``first`` in row-major order, at their places in the whole tensor."""
    # A run is what lies in one piece in both: a chunk's extent along ``axis`` and all axes after it.
    axis = len(shape)
    while axis and (axis == len(shape) or chunk.sizes[axis] == shape[axis]):
        axis -= 1
    run = math.prod(chunk.sizes[axis:])
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    origin = sum(offset * stride for offset, stride in zip(chunk.offsets, strides, strict=True))
    last = first + len(data) // size
    rows = itertools.product(*(range(0, n * s, s) for n, s in zip(chunk.sizes[:axis], strides, strict=False)))
    for index, row in enumerate(itertools.islice(rows, first // run, -(-last // run)), first // run):
        start, stop = max(first, index * run), min(last, (index + 1) * run)
        place = (origin + sum(row) + start - index * run) * size
        target[place : place + (stop - start) * size] = data[(start - first) * size : (stop - first) * size]
