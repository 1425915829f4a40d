"""NVIDIA GPUs: the facts of the hardware, against a stand-in for ``torch.cuda``."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from powertrain.errors import AcceleratorError
from powertrain.plugin import NoConfig, Probe
from powertrain.testing.device_module import FakeDeviceModule
from powertrain_cuda.accelerator import CudaAccelerator, driver_version
from powertrain_cuda.plugin import CudaPlugin


def gpus(devices: int = 2, **settings: object) -> FakeDeviceModule:
    """Return a stand-in with ``devices`` GPUs of compute capability 9.0."""
    return FakeDeviceModule(devices, facts={"major": 9, "minor": 0}, **settings)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch be a build for CUDA."""
    monkeypatch.setattr(torch.version, "cuda", "1.0")


def install(monkeypatch: pytest.MonkeyPatch, module: FakeDeviceModule, cuda: str | None, hip: str | None) -> None:
    """Let torch be a build for these libraries that sees these devices."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "get_device_module", {"cuda": module}.__getitem__)


def test_available_where_torch_has_cuda_and_sees_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin is available, says how many devices there are, and makes no context on any."""
    module = gpus()
    install(monkeypatch, module, "12.8", None)
    plugin = CudaPlugin(NoConfig())
    assert plugin.is_available() == Probe(True, "2 devices")
    accelerator = plugin.make_accelerator("cuda")
    assert isinstance(accelerator, CudaAccelerator)
    assert accelerator.device(1) == torch.device("cuda", 1)
    assert not module.contexts


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_not_available_in_another_build(monkeypatch: pytest.MonkeyPatch, hip: str | None) -> None:
    """A build without CUDA, one for AMD included, is not used, even if it sees devices."""
    install(monkeypatch, gpus(), None, hip)
    plugin = CudaPlugin(NoConfig())
    assert plugin.is_available() == Probe(False, "this build of torch has no CUDA")
    with pytest.raises(AcceleratorError, match="this torch was built without cuda"):
        plugin.make_accelerator("cuda").device(0)


def test_not_available_without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device the reason is the driver layer's own, and choosing it all the same is an error with it."""
    install(monkeypatch, gpus(0, complaint="the driver is too old"), "12.8", None)
    plugin = CudaPlugin(NoConfig())
    assert plugin.is_available() == Probe(False, "the driver is too old")
    with pytest.raises(AcceleratorError, match="the driver is too old"):
        plugin.make_accelerator("cuda").device(0)


def test_declines_other_names() -> None:
    """The hook answers to no other name, and asks nothing for it."""
    assert CudaPlugin(NoConfig()).make_accelerator("cpu") is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has CUDA")
def test_plugin_answers_without_torch_in_a_build_without_cuda() -> None:
    """Where torch has no CUDA, saying so imports no torch."""
    code = (
        "import sys; from powertrain.plugin import NoConfig; from powertrain_cuda.plugin import CudaPlugin\n"
        "assert not CudaPlugin(NoConfig()).is_available().available; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_too_many_ranks_are_told_how_many_fit() -> None:
    """The rank beyond the last device gets the number of devices and a command."""
    with pytest.raises(AcceleratorError, match="local rank 2 has no cuda device") as caught:
        CudaAccelerator(gpus()).device(2)
    assert "powertrain launch --nproc 2 " in caught.value.remedy


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_needs_units_not_emulation(bf16: bool) -> None:
    """A GPU that only emulates bfloat16 does not offer it."""
    assert (torch.bfloat16 in CudaAccelerator(gpus(bf16=bf16)).dtypes()) is bf16


def test_optional_parts_and_libraries() -> None:
    """Streams, pinned memory and graphs are there; NCCL comes before gloo."""
    accelerator = CudaAccelerator(gpus())
    assert accelerator.capabilities == {"streams", "pinned", "graphs", "kernels"}
    assert accelerator.backends() == ("nccl", "gloo")


def test_describe_gives_capability_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """People see name, capability, CUDA's version and the driver; without a device no name."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    facts = CudaAccelerator(gpus()).describe()
    assert (facts["name"], facts["capability"], facts["cuda"]) == ("Fake 1000", "9.0", "12.8")
    assert facts["driver"]
    assert "capability" not in CudaAccelerator(gpus(0)).describe()


def test_driver_version_of_both_kernel_modules(tmp_path: Path) -> None:
    """The proprietary and the open kernel module word their line differently; no file is "unknown"."""
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC\n")
    assert driver_version(file) == "550.54.15"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n")
    assert driver_version(file) == "570.86.15"
    assert driver_version(tmp_path / "absent") == "unknown"


STAND_IN = sorted(
    name for name in vars(FakeDeviceModule) if not name.startswith("_") and name not in {"allocate", "release", "draw"}
)


@pytest.mark.parametrize("name", STAND_IN)
def test_the_stand_in_is_called_as_torch_is(name: str) -> None:
    """Everything the stand-in offers is in ``torch.cuda``, and takes the arguments that it takes."""
    real = getattr(torch.cuda, name)
    if name in {"Stream", "Event", "device"}:  # classes of C, whose signatures cannot be read
        assert isinstance(real, type)
        return
    taken = inspect.signature(getattr(FakeDeviceModule(), name)).parameters.values()
    inspect.signature(real).bind(*(object() for one in taken if one.default is one.empty))
