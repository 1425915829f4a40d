"""One rank of benchmarks/checkpoint.py: reads what to do, a line each, and answers when it began and ended."""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from powertrain.environment import Rank
from powertrain.mesh import Mesh
from powertrain.plugin import NoConfig
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain.testing.surroundings import make_context
from powertrain_checkpoint.plugin import CheckpointPlugin
from powertrain_comm.transport import TorchCommunicator
from powertrain_offload.config import OffloadConfig
from powertrain_offload.plugin import OffloadPlugin

warnings.simplefilter("ignore")
State = dict[str, torch.Tensor]
Action = Callable[[], Any]


def answer(text: str) -> None:
    print(f"= {text}", flush=True)


def state_of(rank: Rank, nbytes: int) -> State:
    """Return this rank's share of a transformer's parameters and moments, in fp32, filled with noise."""
    width = 1024
    shapes: list[tuple[int, ...]] = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width)]
    shapes += [(4 * width,), (width, 4 * width), (width,), (width,), (width,)]
    result: State = {}
    left, number = nbytes // rank.world_size, 0
    while left > 0:
        shape = shapes[number % len(shapes)]
        if 4 * torch.Size(shape).numel() > left:
            shape = (max(left // 4, 1),)
        result[f"rank{rank.index}/{number // len(shapes)}.{number % len(shapes)}"] = torch.rand(shape)
        left -= 4 * torch.Size(shape).numel()
        number += 1
    return result


def cold(root: Path) -> None:
    """Drop all files below a directory from the page cache."""
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Worker:
    """Saves and loads one state in several ways, each in a directory of its own."""

    def __init__(self, root: Path, nbytes: int) -> None:
        self.rank = Rank.from_environment()
        mesh = Mesh.build(self.rank.world_size, self.rank.index)
        self.communicator = TorchCommunicator("gloo", torch.device("cpu"), mesh, self.rank, 300.0)
        self.root, self.state = root, state_of(self.rank, nbytes)
        engines = make_context(self.communicator, plugins=[OffloadPlugin(OffloadConfig())])
        plain = make_context(self.communicator)
        plugin = CheckpointPlugin(NoConfig())
        self.stores = {
            name: plugin.make_checkpoint_store(uri=str(root / name), context=context)
            for name, context in (("powertrain", engines), ("buffered", plain))
        }

    def slices(self) -> list[TensorSlice]:
        return [TensorSlice(name, tuple(tensor.shape), tensor.view(-1)) for name, tensor in self.state.items()]

    def save(self, way: str) -> Action:
        """Return what saves, with fsync; what was saved before in this way is gone."""
        path = self.root / way
        if self.rank.index == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        dist.barrier()
        if way in self.stores:
            snapshot = Snapshot(tensors=self.slices(), values={}, rank_values={})
            return lambda: self.stores[way].save("x", snapshot)
        if way == "torch.save":
            return lambda: self._torch_save(path / f"{self.rank.index}")
        threads = int(way.partition(":")[2])
        writer = dcp.FileSystemWriter(
            path, thread_count=threads, single_file_per_rank=threads == 1, sync_files=True, overwrite=True
        )
        return lambda: dcp.save(self.state, storage_writer=writer)

    def _torch_save(self, path: Path) -> None:
        with path.open("wb") as file:
            torch.save(self.state, file)
            file.flush()
            os.fsync(file.fileno())

    def load(self, way: str) -> Action:
        """Return what loads, with nothing in the page cache."""
        path = self.root / way
        dist.barrier()
        if self.rank.index == 0:
            cold(path)
        for tensor in self.state.values():
            tensor.zero_()
        if way in self.stores:
            return lambda: self.stores[way].open().read(self.slices())
        if way == "torch.save":
            return lambda: torch.load(path / f"{self.rank.index}", weights_only=True)
        return lambda: dcp.load(self.state, storage_reader=dcp.FileSystemReader(path))


def main() -> None:
    torch.set_num_threads(1)
    worker = Worker(Path(sys.argv[1]), int(sys.argv[2]))
    answer("ready")
    for line in sys.stdin:
        what, way = line.split()
        action = worker.save(way) if what == "save" else worker.load(way)
        dist.barrier()
        started = time.monotonic()
        action()
        answer(f"{started!r} {time.monotonic()!r}")
    for store in worker.stores.values():
        store.close()


if __name__ == "__main__":
    main()
