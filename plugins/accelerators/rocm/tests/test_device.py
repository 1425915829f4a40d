"""AMD GPUs: what only a real device can show."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from powertrain_rocm.accelerator import RocmAccelerator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.version.hip is None or not torch.cuda.device_count(), reason="needs a ROCm device"),
]

MIB = 2**20


@pytest.fixture
def rocm() -> RocmAccelerator:
    """The accelerator, its first device current."""
    accelerator = RocmAccelerator()
    accelerator.activate(accelerator.device(0))
    return accelerator


def test_asking_what_there_is_creates_no_context() -> None:
    """A process that has only asked for devices has not initialized HIP."""
    code = (
        "import torch; from powertrain_rocm.accelerator import RocmAccelerator\n"
        "accelerator = RocmAccelerator(); assert accelerator.probe().available\n"
        "assert accelerator.device(0).index == 0; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_counts_what_tensors_hold(rocm: RocmAccelerator) -> None:
    """64 MiB held show in used and peak; released, the peak stays until it is reset."""
    device = rocm.device(0)
    before = rocm.memory(device).used
    held = torch.ones(16 * MIB, device=device)
    assert rocm.memory(device).used - before >= 64 * MIB
    del held
    memory = rocm.memory(device)
    assert memory.used <= before
    assert memory.peak >= before + 64 * MIB
    assert 0 < memory.free <= memory.total
    rocm.reset_peak_memory(device)
    assert rocm.memory(device).peak == rocm.memory(device).used


def test_generator_is_seeded_and_continues_from_its_state(rocm: RocmAccelerator) -> None:
    """One seed gives one sequence, and a restored state repeats what followed it."""
    device = rocm.device(0)
    rocm.seed(3, device)
    state = rocm.rng_state(device)
    assert (state.dtype, state.device.type) == (torch.uint8, "cpu")
    first = torch.rand(4, device=device)
    rocm.set_rng_state(state, device)
    assert torch.equal(torch.rand(4, device=device), first)


def test_streams_order_copies_from_pinned_memory(rocm: RocmAccelerator) -> None:
    """Data copied on a side stream is whole for the work that waited for its event."""
    device = rocm.device(0)
    source = rocm.pin(torch.arange(16 * MIB))
    assert source.is_pinned()
    side = rocm.stream(device)
    target = torch.zeros(16 * MIB, dtype=torch.int64, device=device)
    rocm.wait(side, rocm.record(None))
    with rocm.use_stream(side):
        target.copy_(source, non_blocking=True)
        copied = rocm.record(side)
    rocm.wait(None, copied)
    total = target.sum()
    rocm.synchronize(device)
    assert total.item() == source.sum().item()


def test_it_computes_in_every_type_it_names(rocm: RocmAccelerator) -> None:
    """A forward and backward pass of a linear layer works in each offered type."""
    device = rocm.device(0)
    for dtype in rocm.dtypes():
        layer = torch.nn.Linear(8, 8, device=device, dtype=dtype)
        layer(torch.ones(2, 8, device=device, dtype=dtype)).sum().backward()
        assert layer.weight.grad is not None


def test_describe_names_the_device(rocm: RocmAccelerator) -> None:
    """The real properties give a name and an architecture."""
    facts = rocm.describe()
    assert facts["name"]
    assert facts["architecture"].startswith("gfx")
