"""The processor as an accelerator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from powertrain.errors import AcceleratorError
from powertrain.plugin import NoConfig
from powertrain_cpu import host
from powertrain_cpu.accelerator import CpuAccelerator
from powertrain_cpu.plugin import CpuPlugin

CPU = torch.device("cpu")


def test_plugin_is_a_fallback_that_is_always_there() -> None:
    """Auto-detection takes the processor last, and its reason is the number of cores."""
    plugin = CpuPlugin(NoConfig())
    assert plugin.fallback
    probe = plugin.is_available()
    assert probe.available
    assert probe.reason.startswith(f"{host.usable_cores()} core")


def test_plugin_answers_without_torch() -> None:
    """Constructing the plugin and asking whether it is available imports no torch."""
    code = (
        "import sys; from powertrain.plugin import NoConfig; from powertrain_cpu.plugin import CpuPlugin\n"
        "assert CpuPlugin(NoConfig()).is_available().available; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plugin_makes_only_what_it_is_asked_for() -> None:
    """The hook answers to its own name and declines every other."""
    plugin = CpuPlugin(NoConfig())
    assert isinstance(plugin.make_accelerator("cpu"), CpuAccelerator)
    assert plugin.make_accelerator("gpu") is None


@pytest.mark.parametrize("index", [0, 1, 63])
def test_every_local_rank_shares_the_device(index: int) -> None:
    """Any number of ranks computes on one processor."""
    assert CpuAccelerator().device(index) == CPU


def test_a_negative_rank_is_an_error() -> None:
    """There is no device for a rank that cannot be."""
    with pytest.raises(AcceleratorError, match="local rank -1"):
        CpuAccelerator().device(-1)


def test_it_trains_in_every_type_it_names() -> None:
    """A forward and backward pass of a linear layer works in each offered type."""
    types = CpuAccelerator().dtypes()
    assert types == {torch.float32, torch.bfloat16, torch.float16, torch.float64}
    for dtype in types:
        layer = torch.nn.Linear(4, 4, dtype=dtype)
        layer(torch.ones(2, 4, dtype=dtype)).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == dtype


def test_memory_figures_are_consistent() -> None:
    """Used is at most the peak, free at most the total, and nothing is zero here."""
    memory = CpuAccelerator().memory(CPU)
    assert 0 < memory.used <= memory.peak
    assert 0 < memory.free <= memory.total


def test_generator_is_seeded_and_continues_from_its_state() -> None:
    """One seed gives one sequence, and a restored state repeats what followed it."""
    cpu = CpuAccelerator()
    kept = cpu.rng_state(CPU)
    try:
        cpu.seed(3, CPU)
        first = torch.rand(4)
        state = cpu.rng_state(CPU)
        assert state.dtype == torch.uint8
        second = torch.rand(4)
        cpu.set_rng_state(state, CPU)
        assert torch.equal(torch.rand(4), second)
        cpu.seed(3, CPU)
        assert torch.equal(torch.rand(4), first)
    finally:
        cpu.set_rng_state(kept, CPU)


def test_optional_parts_fall_back() -> None:
    """Without streams and pinned memory the role's defaults stand in, and gloo connects ranks."""
    cpu = CpuAccelerator()
    tensor = torch.ones(2)
    assert cpu.capabilities == {"kernels"}
    assert cpu.pin(tensor) is tensor
    assert cpu.backends() == ("gloo",)
    with cpu.use_stream(cpu.stream(CPU)):
        cpu.wait(None, cpu.record(None))
    cpu.activate(CPU)
    cpu.synchronize(CPU)


def test_describe_gives_facts_as_text() -> None:
    """People see a name, cores, threads and instructions."""
    facts = CpuAccelerator().describe()
    assert set(facts) == {"name", "cores", "threads", "vectors", "instructions"}
    assert all(facts.values())
    assert facts["threads"] == str(torch.get_num_threads())


def test_processor_facts_of_both_architectures(tmp_path: Path) -> None:
    """x86 lists flags and Arm features; only notable ones are shown, in a fixed order."""
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: Xeon 4\nflags\t\t: fpu amx_bf16 avx2\nmodel name : other\n")
    assert host.model_name(file) == "Xeon 4"
    assert host.instruction_sets(file) == ["avx2", "amx_bf16"]
    file.write_text("BogoMIPS\t: 50\nFeatures\t: fp asimd bf16 aes\n")
    assert host.model_name(file)
    assert host.instruction_sets(file) == ["asimd", "bf16"]
    assert host.instruction_sets(tmp_path / "absent") == []


def test_cores_follow_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process bound to some cores counts those; without affinity every core counts."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert host.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert host.usable_cores() == os.cpu_count()


HOLES = """
import torch
from powertrain_cpu.accelerator import CpuAccelerator

accelerator = CpuAccelerator()
device = accelerator.device(0)
tensors = [torch.ones(2**14) for _ in range(1600)]  # 64 KiB each, 100 MB together
pins = tensors[::2]
del tensors
before = accelerator.memory(device).used
accelerator.release_unused(device)
assert accelerator.memory(device).used < before - 30e6
assert all(float(pin[0]) == 1.0 for pin in pins)
"""


def test_unused_memory_goes_back_to_the_system() -> None:
    """What freed tensors left between others is no longer resident afterwards; in a process with a heap of its own."""
    subprocess.run([sys.executable, "-c", HOLES], check=True, timeout=120)
