"""Reading a checkpoint under any layout: each rank fetches the parts that its own boxes need."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from powertrain.errors import CheckpointMismatch
from powertrain.roles.checkpoint import CheckpointReader, TensorInfo, TensorSlice
from powertrain.roles.communicator import Communicator
from powertrain_checkpoint.bands import Bands
from powertrain_checkpoint.dtypes import to_torch
from powertrain_checkpoint.fetching import Fetcher, fetches
from powertrain_checkpoint.manifest import Manifest
from powertrain_checkpoint.means import Means
from powertrain_checkpoint.planning import ReadPlanner
from powertrain_checkpoint.spare import spare_memory
from powertrain_checkpoint.verdict import together

_log = logging.getLogger("powertrain.checkpoint")


class DirectoryReader(CheckpointReader):
    """A complete checkpoint directory, open for reading by all ranks.

    ``read`` is called on every rank the same number of times (with an empty
    sequence where a rank needs nothing): the ranks agree on how it ended.
    """

    def __init__(self, directory: Path, manifest: Manifest, communicator: Communicator, means: Means) -> None:
        self.tag = manifest.tag
        self.values = manifest.values
        self.rank_values = manifest.rank_values
        self.tensors = {
            name: TensorInfo(tensor.shape, to_torch(tensor.dtype)) for name, tensor in manifest.tensors.items()
        }
        self._directory = directory
        self._manifest = manifest
        self._communicator = communicator
        self._bands = Bands(manifest, ReadPlanner())
        self._means = means

    def read(self, slices: Sequence[TensorSlice]) -> None:
        """Fill the slices in place, converting element types; verify every block that is read.

        Nothing is changed on any rank when a name or shape is wrong, or a block damaged, on one: all is
        read and verified before anything is filled. What was verified stays in memory meanwhile, as far as half of
        what the host has to spare goes; the rest is read and verified a second time. What rests elsewhere is
        filled piece by piece.

        Raises:
            CheckpointMismatch: names or shapes differ from the checkpoint's.
            ShardMissing, ShardTruncated, ShardCorrupt: a file is damaged.
        """
        together(self._communicator, "checkpoint names", lambda: self._check(slices))
        begin = time.monotonic()
        # What rests in memory may be in the midst of an update.
        self._means.synchronize([item.tensor for item in slices])
        files = self._manifest.files
        wanted = fetches(self._bands.of(slices), files)
        count = sum(fetch.nbytes for fetch in wanted)
        with Fetcher(self._means, self._directory, files, wanted, self._room()) as fetcher:
            together(self._communicator, "checkpoint verify", fetcher.verify)
            together(self._communicator, "checkpoint read", fetcher.copy)
        seconds = time.monotonic() - begin
        if seconds > 2:
            _log.info("read %.2f GB of %s at %.2f GB/s", count / 1e9, self.tag, count / 1e9 / seconds)

    def _room(self) -> int:
        return spare_memory(self._means.ranks)

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
