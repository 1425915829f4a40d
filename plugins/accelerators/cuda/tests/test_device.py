"""NVIDIA GPUs: what only a real device can show."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from powertrain.testing.accelerator import AcceleratorContract
from powertrain_cuda.accelerator import CudaAccelerator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.version.cuda is None or not torch.cuda.device_count(), reason="needs a CUDA device"),
]


class TestCuda(AcceleratorContract):
    """Every test of the contract, on ``CudaAccelerator``."""

    def make(self) -> CudaAccelerator:
        """Return the accelerator."""
        return CudaAccelerator()


def test_asking_what_there_is_creates_no_context() -> None:
    """A process that has only asked for devices has not initialized CUDA."""
    code = (
        "import torch; from powertrain_cuda.accelerator import CudaAccelerator\n"
        "accelerator = CudaAccelerator(); assert accelerator.probe().available\n"
        "assert accelerator.device(0).index == 0; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_side_streams_order_copies_from_pinned_memory() -> None:
    """Data copied on a side stream is whole for the current stream's work that waited for its event."""
    accelerator = CudaAccelerator()
    device = accelerator.device(0)
    accelerator.activate(device)
    source = accelerator.pin(torch.arange(2**24))
    assert source.is_pinned()
    side = accelerator.stream(device)
    target = torch.zeros(2**24, dtype=torch.int64, device=device)
    accelerator.wait(side, accelerator.record(None))
    with accelerator.use_stream(side):
        target.copy_(source, non_blocking=True)
        copied = accelerator.record(side)
    accelerator.wait(None, copied)
    total = target.sum()
    accelerator.synchronize(device)
    assert total.item() == source.sum().item()


def test_describe_names_the_device() -> None:
    """The real properties give a name and an architecture."""
    facts = CudaAccelerator().describe()
    assert facts["name"]
    assert facts["capability"]
