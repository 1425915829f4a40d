"""AMD GPUs: the facts of the hardware, against a stand-in for ``torch.cuda`` as a ROCm build has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from powertrain.errors import AcceleratorError
from powertrain.plugin import NoConfig, Probe
from powertrain.testing.device_module import FakeDeviceModule
from powertrain_rocm.accelerator import RocmAccelerator, driver_version
from powertrain_rocm.plugin import RocmPlugin


def gpus(devices: int = 2, **settings: object) -> FakeDeviceModule:
    """Return a stand-in with ``devices`` GPUs of architecture gfx942."""
    return FakeDeviceModule(devices, facts={"gcnArchName": "gfx942:sramecc+"}, **settings)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch be a build for ROCm."""
    monkeypatch.setattr(torch.version, "hip", "1.0")


def install(monkeypatch: pytest.MonkeyPatch, module: FakeDeviceModule, cuda: str | None, hip: str | None) -> None:
    """Let torch be a build for these libraries that sees these devices."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "get_device_module", {"cuda": module}.__getitem__)


def test_available_where_torch_has_rocm_and_sees_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin is available, says how many devices there are, and makes no context on any."""
    module = gpus()
    install(monkeypatch, module, None, "6.4")
    plugin = RocmPlugin(NoConfig())
    assert plugin.is_available() == Probe(True, "2 devices")
    accelerator = plugin.make_accelerator("rocm")
    assert isinstance(accelerator, RocmAccelerator)
    assert accelerator.device(1) == torch.device("cuda", 1)
    assert not module.contexts


@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_not_available_in_another_build(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    """A build without ROCm, one for NVIDIA included, is not used, even if it sees devices."""
    install(monkeypatch, gpus(), cuda, None)
    plugin = RocmPlugin(NoConfig())
    assert plugin.is_available() == Probe(False, "this build of torch has no ROCm")
    with pytest.raises(AcceleratorError, match="this torch was built without hip"):
        plugin.make_accelerator("rocm").device(0)


def test_not_available_without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device the reason is the driver layer's own, and choosing it all the same is an error with it."""
    install(monkeypatch, gpus(0, complaint="no amdgpu module"), None, "6.4")
    plugin = RocmPlugin(NoConfig())
    assert plugin.is_available() == Probe(False, "no amdgpu module")
    with pytest.raises(AcceleratorError, match="no amdgpu module"):
        plugin.make_accelerator("rocm").device(0)


def test_declines_other_names() -> None:
    """The hook answers to no other name, and asks nothing for it."""
    assert RocmPlugin(NoConfig()).make_accelerator("cuda") is None


@pytest.mark.skipif(torch.version.hip is not None, reason="this build of torch has ROCm")
def test_plugin_answers_without_torch_in_a_build_without_rocm() -> None:
    """Where torch has no ROCm, saying so imports no torch."""
    code = (
        "import sys; from powertrain.plugin import NoConfig; from powertrain_rocm.plugin import RocmPlugin\n"
        "assert not RocmPlugin(NoConfig()).is_available().available; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_too_many_ranks_are_told_how_many_fit() -> None:
    """The rank beyond the last device gets the number of devices and a command."""
    with pytest.raises(AcceleratorError, match="local rank 2 has no rocm device") as caught:
        RocmAccelerator(gpus()).device(2)
    assert "powertrain launch --nproc 2 " in caught.value.remedy


def test_number_formats() -> None:
    """Every AMD GPU that torch supports trains in fp32, fp16, fp64 and bf16."""
    assert RocmAccelerator(gpus()).dtypes() == {torch.float32, torch.float16, torch.float64, torch.bfloat16}


def test_optional_parts_and_libraries() -> None:
    """Streams, pinned memory and graphs are there; RCCL, which torch calls nccl, comes before gloo."""
    accelerator = RocmAccelerator(gpus())
    assert accelerator.capabilities == {"streams", "pinned", "graphs", "kernels"}
    assert accelerator.backends() == ("nccl", "gloo")


def test_describe_gives_architecture_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """People see name, architecture, HIP's version and the driver; without a device no name."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    facts = RocmAccelerator(gpus()).describe()
    assert (facts["name"], facts["architecture"], facts["hip"]) == ("Fake 1000", "gfx942:sramecc+", "6.4")
    assert facts["driver"]
    assert "architecture" not in RocmAccelerator(gpus(0)).describe()


def test_driver_version(tmp_path: Path) -> None:
    """The kernel module's file holds the bare version; no file is "unknown"."""
    file = tmp_path / "version"
    file.write_text("6.12.12\n")
    assert driver_version(file) == "6.12.12"
    assert driver_version(tmp_path / "absent") == "unknown"
