"""Reading a checkpoint under any layout: each rank fetches the parts that its own boxes need."""

from __future__ import annotations

import difflib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import torch

from powertrain.errors import CheckpointMismatch
from powertrain.roles.checkpoint import CheckpointReader, TensorInfo, TensorSlice
from powertrain.roles.communicator import Communicator
from powertrain_checkpoint.dtypes import SIZES, to_torch
from powertrain_checkpoint.manifest import BLOCK, Chunk, Manifest
from powertrain_checkpoint.planning import ReadPlanner
from powertrain_checkpoint.shard import Shard
from powertrain_checkpoint.verdict import together

_log = logging.getLogger("powertrain.checkpoint")

_BAND = 16 * BLOCK
"""Bytes read and copied at a time, so that a load needs little memory beside the state itself."""


@attrs.frozen(eq=False)
class _Job:
    """The part of ``chunk`` at ``source`` of extent ``lengths`` goes to ``target``."""

    chunk: Chunk
    dtype: str
    source: tuple[int, ...]
    lengths: tuple[int, ...]
    target: torch.Tensor


class DirectoryReader(CheckpointReader):
    """A complete checkpoint directory, open for reading by all ranks.

    ``read`` is called on every rank the same number of times (with an empty
    sequence where a rank needs nothing): the ranks agree on how it ended.
    """

    def __init__(self, directory: Path, manifest: Manifest, communicator: Communicator) -> None:
        self.tag = manifest.tag
        self.values = manifest.values
        self.rank_values = manifest.rank_values
        self.tensors = {
            name: TensorInfo(tensor.shape, to_torch(tensor.dtype)) for name, tensor in manifest.tensors.items()
        }
        self._directory = directory
        self._manifest = manifest
        self._communicator = communicator
        self._planner = ReadPlanner()

    def read(self, slices: Sequence[TensorSlice]) -> None:
        """Fill the slices in place, converting element types; verify every block that is read.

        Nothing is changed on any rank when a name or shape is wrong, or a block damaged, on one:
        each needed byte is read twice, first only to verify, then (mostly from the
        page cache) to verify and copy.

        Raises:
            CheckpointMismatch: names or shapes differ from the checkpoint's.
            ShardMissing, ShardTruncated, ShardCorrupt: a file is damaged.
        """
        together(self._communicator, "checkpoint names", lambda: self._check(slices))
        begin = time.monotonic()
        jobs = self._jobs(slices)
        together(self._communicator, "checkpoint verify", lambda: self._run(jobs, copying=False))
        count, _ = together(self._communicator, "checkpoint read", lambda: self._run(jobs, copying=True))
        seconds = time.monotonic() - begin
        if seconds > 2:
            _log.info("read %.2f GB of %s at %.2f GB/s", count / 1e9, self.tag, count / 1e9 / seconds)

    def _check(self, slices: Sequence[TensorSlice]) -> None:
        problems, missing = [], 0
        for item in slices:
            info = self.tensors.get(item.name)
            if info is None:
                missing += 1
                near = difflib.get_close_matches(item.name, self.tensors, n=1) if missing <= 10 else []
                problems.append(f"{item.name} is not in it" + (f" (nearest: {near[0]})" if near else ""))
            elif info.shape != tuple(item.shape):
                problems.append(f"{item.name} is {list(info.shape)} in it and {list(item.shape)} in the model")
        if problems:
            more = [f"… and {len(problems) - 10} more"] if len(problems) > 10 else []
            raise CheckpointMismatch(
                f"checkpoint {self.tag} was made from another model: {len(problems)} tensors do not fit",
                where=str(self._directory),
                found="\n    ".join(problems[:10] + more),
            )

    def _jobs(self, slices: Sequence[TensorSlice]) -> dict[int, list[_Job]]:
        """Return what ``slices`` need of each file, in the order of its bytes."""
        jobs: dict[int, list[_Job]] = defaultdict(list)
        for item in slices:
            chunks = item.chunks()
            tensor = self._manifest.tensors[item.name]
            for copy in self._planner.plan(item.name, tensor, [box for box, _ in chunks]):
                chunk = tensor.chunks[copy.chunk]
                target = _part(chunks[copy.target][1], copy.destination, copy.lengths)
                jobs[chunk.file].append(_Job(chunk, tensor.dtype, copy.source, copy.lengths, target))
        return {index: sorted(jobs[index], key=lambda job: job.chunk.start) for index in sorted(jobs)}

    def _run(self, jobs: Mapping[int, Sequence[_Job]], *, copying: bool) -> int:
        """Read and verify the jobs' bytes, and copy them to their targets if asked; return how many bytes."""
        count, buffer = 0, bytearray(_BAND + 2 * BLOCK)
        for index, parts in jobs.items():
            with Shard(self._directory, self._manifest.files[index]) as shard:
                count += sum(_read(shard, job, buffer, copying=copying) for job in parts)
        return count


def _part(tensor: torch.Tensor, start: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for axis, (first, length) in enumerate(zip(start, lengths, strict=True)):
        tensor = tensor.narrow(axis, first, length)
    return tensor


def _read(shard: Shard, job: _Job, buffer: bytearray, *, copying: bool) -> int:
    """Read and verify one job's bytes, and copy them to its target if asked; return how many bytes."""
    chunk, size = job.chunk, SIZES[job.dtype]
    strides = [math.prod(chunk.sizes[axis + 1 :]) for axis in range(len(chunk.sizes))]
    length = math.prod(chunk.sizes) * size
    count = 0
    for start, extent in _bands(job.lengths, strides, _BAND // size):
        first = sum((a + b) * stride for a, b, stride in zip(job.source, start, strides, strict=True))
        span = 1 + sum((n - 1) * stride for n, stride in zip(extent, strides, strict=True))
        view = shard.read(chunk, length, first * size, (first + span) * size, buffer)
        if copying:
            flat = torch.frombuffer(view, dtype=to_torch(job.dtype))
            _part(job.target, start, extent).copy_(flat.as_strided(extent, strides))
        count += len(view)
    return count


def _bands(
    lengths: tuple[int, ...], strides: Sequence[int], limit: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a part into (start, extent) pieces, each spanning at most ``limit`` elements of its chunk."""
    start = (0,) * len(lengths)
    span = 1 + sum((n - 1) * stride for n, stride in zip(lengths, strides, strict=True))
    if span <= limit:
        yield start, lengths
        return
    # The first axis with more than one index: a piece of it spans the least.
    axis = next(i for i, n in enumerate(lengths) if n > 1)
    tail = 1 + sum((n - 1) * stride for n, stride in zip(lengths[axis + 1 :], strides[axis + 1 :], strict=True))
    rows = max(1, (limit - tail) // strides[axis] + 1)
    for first in range(0, lengths[axis], rows):
        extent = (*lengths[:axis], min(rows, lengths[axis] - first), *lengths[axis + 1 :])
        for inner, size in _bands(extent, strides, limit):
            yield tuple(a + (first if i == axis else 0) for i, a in enumerate(inner)), size
