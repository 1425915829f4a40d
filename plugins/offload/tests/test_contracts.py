"""Every tier and every engine, held to the contract of its role."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from powertrain.roles.accelerator import Accelerator
from powertrain.roles.files import FileEngine
from powertrain.roles.tier import DeviceTier, Tier
from powertrain.roles.torch_device import TorchDeviceAccelerator
from powertrain.testing.device_module import FakeDeviceModule
from powertrain.testing.files import FileEngineContract
from powertrain.testing.null import NullHost
from powertrain.testing.tier import TierContract
from powertrain_offload import host, io
from powertrain_offload.disk import DiskTier
from powertrain_offload.host import HostTier
from powertrain_offload.pool import Pool
from powertrain_offload.ratio import RatioTier
from powertrain_offload.swap import SwapFile

CPU, GRAIN, BUFFERS = torch.device("cpu"), 1 << 16, 8 << 20


def working(kind: str) -> None:
    """Skip where an engine does not work, and say why."""
    if reason := io.available()[kind]:  # type: ignore[index]
        pytest.skip(f"the engine {kind} does not work here: {reason}")


class OwnDisk(DiskTier):
    """A disk tier that closes what it uses: in a run, several share it."""

    def __init__(self, directory: Path, kind: str, *, directories: int = 1, buffers: int = BUFFERS) -> None:
        places = [directory / str(number) for number in range(directories)]
        for place in places:
            place.mkdir()
        self.engine = io.open_engine(kind, block=1 << 14, depth=4, threads=2)
        super().__init__(SwapFile(self.engine, places), Pool(self.engine, buffers), CPU, GRAIN)

    def close(self) -> None:
        self.swap.close()
        self.pool.drop()
        self.engine.close()


class Books(TorchDeviceAccelerator):
    """A device with streams and page-locked memory, whose memory is the host's: calls go to a fake of its module."""

    name = "books"
    device_type = "cpu"

    def __init__(self) -> None:
        super().__init__(FakeDeviceModule(1))

    def share(self, tensor: torch.Tensor, stream: object) -> None:
        self.module.calls.append(f"share with {self.module.current_stream().name if stream is None else stream.name}")  # type: ignore[attr-defined]

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.module.calls.append(f"pin {tensor.numel()}")
        return tensor.clone()


class TestDeviceTier(TierContract):
    def make(self, directory: Path) -> Tier:
        return DeviceTier(CPU)


class Disk(TierContract):
    kind = "threads"

    @pytest.fixture(autouse=True)
    def _works(self) -> None:
        working(self.kind)

    def make(self, directory: Path) -> Tier:
        return OwnDisk(directory, self.kind)

    def held(self, tier: Tier) -> int | None:
        assert isinstance(tier, DiskTier)
        return tier.swap.used


class TestDiskThreads(Disk):
    pass


class TestDiskDirect(Disk):
    kind = "direct"


class TestDiskUring(Disk):
    kind = "uring"


class TestDiskWithFewBuffers(Disk):
    """Less memory for transfers than what is under way at once, and two directories."""

    def make(self, directory: Path) -> Tier:
        return OwnDisk(directory, self.kind, directories=2, buffers=1 << 20)


class TestDiskToADevice(Disk):
    """Content is used on a device with memory of its own: the host's memory goes by another name here."""

    @pytest.fixture(autouse=True)
    def _apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("powertrain_offload.disk._HOST", torch.device("meta"))


class TestHostUsedThere(TierContract):
    """State that the processor itself uses."""

    def make(self, directory: Path) -> Tier:
        return HostTier(Books(), torch.device("cpu", 0), CPU, GRAIN)


class TestHostToADeviceWithStreams(TierContract):
    """State that a device uses, which has memory of its own: the host's memory goes by another name here."""

    accelerator: type[Accelerator] = Books

    @pytest.fixture(autouse=True)
    def _apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host, "_HOST", torch.device("meta"))

    def make(self, directory: Path) -> Tier:
        return HostTier(self.accelerator(), torch.device("cpu", 0), CPU, GRAIN)


class TestHostToAPlainDevice(TestHostToADeviceWithStreams):
    """A device without streams, and without page-locked memory."""

    accelerator = NullHost


class TestRatio(TierContract):
    """A part rests on a disk, the rest stays."""

    ratio = 0.4

    def make(self, directory: Path) -> Tier:
        return RatioTier(OwnDisk(directory, "threads"), DeviceTier(CPU), self.ratio)


class TestRatioOfHost(TierContract):
    def make(self, directory: Path) -> Tier:
        return RatioTier(HostTier(Books(), torch.device("cpu", 0), CPU, GRAIN), DeviceTier(CPU), 0.75)


class Engine(FileEngineContract):
    kind = "threads"

    @pytest.fixture(autouse=True)
    def _works(self) -> None:
        working(self.kind)

    def make(self) -> FileEngine:
        return io.open_engine(self.kind, block=1 << 14, depth=4, threads=3)


class TestThreads(Engine):
    pass


class TestDirect(Engine):
    kind = "direct"


class TestUring(Engine):
    kind = "uring"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No swap file is to be seen at the end, and nothing in the test's directory stays open."""
    yield
    assert not list(tmp_path.rglob("powertrain-swap-*"))
    if Path("/proc/self/fd").exists():
        gc.collect()
        opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert not [path for path in opened if path.is_relative_to(tmp_path)]
