"""The accelerator over torch's device modules, against a stand-in that keeps a device's books."""

from __future__ import annotations

import pytest
import torch

from powertrain.errors import AcceleratorError
from powertrain.roles.accelerator import Memory
from powertrain.roles.torch_device import TorchDeviceAccelerator
from powertrain.testing.device_module import FakeDeviceModule


class Toy(TorchDeviceAccelerator):
    """An accelerator of a device type that torch knows by name only."""

    name = "toy"
    device_type = "privateuseone"


@pytest.fixture
def module() -> FakeDeviceModule:
    """Two devices of 1000 bytes."""
    return FakeDeviceModule(2, total=1000)


@pytest.fixture
def toy(module: FakeDeviceModule) -> Toy:
    """An accelerator over ``module``."""
    return Toy(module)


FIRST, SECOND = torch.device("privateuseone", 0), torch.device("privateuseone", 1)


def test_asking_what_there_is_creates_no_context(toy: Toy, module: FakeDeviceModule) -> None:
    """Probing, counting and naming devices touches none of them."""
    assert toy.probe().available
    assert toy.probe().reason == "2 devices"
    assert toy.device_count() == 2
    assert toy.device(1) == SECOND
    assert toy.capabilities == {"streams", "pinned"}
    toy.reset_peak_memory(FIRST)
    assert not module.contexts


def test_probe_repeats_what_the_driver_layer_complains_about() -> None:
    """Without a device, the reason is the first line of the warning that counting gave."""
    probe = Toy(FakeDeviceModule(0, complaint="the driver is too old\nsee the manual")).probe()
    assert not probe.available
    assert probe.reason == "the driver is too old"


def test_probe_without_device_and_without_complaint_says_so() -> None:
    """An absent device has a reason even when nothing was complained about."""
    probe = Toy(FakeDeviceModule(0)).probe()
    assert not probe.available
    assert "no device" in probe.reason


def test_a_build_of_torch_for_other_devices_has_none(module: FakeDeviceModule) -> None:
    """Where the build lacks the library a device needs, there is no device, whatever the shared module counts."""

    class Elsewhere(Toy):
        build = "no_such_library"

    class Here(Toy):
        build = "git_version"

    assert Elsewhere(module).device_count() == 0
    assert Elsewhere(module).probe().reason == "this torch was built without no_such_library"
    assert Here(module).device_count() == 2


@pytest.mark.parametrize("index", [2, 7, -1])
def test_a_rank_without_device_is_told_how_many_to_start(toy: Toy, index: int) -> None:
    """The error names the local rank, the number of devices and the command that fits."""
    with pytest.raises(AcceleratorError) as caught:
        toy.device(index)
    assert f"local rank {index} " in caught.value.message
    assert caught.value.found == "2 devices on this host"
    assert "powertrain launch --nproc 2 " in caught.value.remedy


def test_a_host_without_device_does_not_suggest_ranks() -> None:
    """With no device at all, the error gives the probe's reason and no rank count."""
    with pytest.raises(AcceleratorError) as caught:
        Toy(FakeDeviceModule(0, complaint="the driver is too old")).device(0)
    assert caught.value.found == "the driver is too old"
    assert "--nproc" not in caught.value.remedy


def test_a_device_type_without_module_is_an_error_not_a_traceback_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unregistered device type is named, with what to do."""

    def absent(device_type: str) -> None:
        raise RuntimeError("no module")

    monkeypatch.setattr(torch, "get_device_module", absent)
    with pytest.raises(AcceleratorError, match="privateuseone"):
        Toy()


def test_the_module_comes_from_torch(monkeypatch: pytest.MonkeyPatch, module: FakeDeviceModule) -> None:
    """Without an argument the accelerator asks torch for the module of its device type."""
    monkeypatch.setattr(torch, "get_device_module", {"privateuseone": module}.__getitem__)
    assert Toy().module is module


def test_activate_and_synchronize_reach_the_device(toy: Toy, module: FakeDeviceModule) -> None:
    """Both calls go to the device they name, in order."""
    toy.activate(SECOND)
    toy.synchronize(SECOND)
    assert module.calls == ["set_device 1", "synchronize 1"]


def test_memory_counts_tensors_peak_and_what_the_allocator_could_give(toy: Toy, module: FakeDeviceModule) -> None:
    """Cached memory is free to this process; the peak outlives a release and is reset to what is held."""
    module.allocate(1, 600)
    module.release(1, 200)
    assert toy.memory(SECOND) == Memory(used=400, peak=600, total=1000, free=600)
    toy.reset_peak_memory(SECOND)
    assert toy.memory(SECOND).peak == 400
    assert toy.memory(FIRST) == Memory(used=0, peak=0, total=1000, free=1000)


def test_bf16_only_where_the_device_has_it() -> None:
    """A device that does not support bfloat16 does not offer it."""

    class Strict(FakeDeviceModule):
        def is_bf16_supported(self, including_emulation: bool = False) -> bool:
            return super().is_bf16_supported(including_emulation)

    common = {torch.float32, torch.float16, torch.float64}
    assert Toy(Strict(bf16=True)).dtypes() == common | {torch.bfloat16}
    assert Toy(Strict(bf16=False)).dtypes() == common


def test_seeding_reaches_one_device_and_leaves_the_current_one(toy: Toy, module: FakeDeviceModule) -> None:
    """Two devices draw the same from one seed, another seed differs, and the current device stays."""
    toy.seed(5, FIRST)
    first = module.draw(0)
    toy.seed(5, SECOND)
    assert module.draw(0) != first
    assert module.draw(1) == first
    assert module.current_device() == 0


def test_generator_continues_from_its_state(toy: Toy, module: FakeDeviceModule) -> None:
    """Restoring a state repeats the numbers drawn after it was taken, on that device only."""
    toy.seed(1, SECOND)
    state = toy.rng_state(SECOND)
    assert state.dtype == torch.uint8
    drawn = module.draw(1)
    toy.set_rng_state(state, SECOND)
    assert module.draw(1) == drawn


def test_streams_order_work_by_events(toy: Toy, module: FakeDeviceModule) -> None:
    """Work on a side stream waits for the current stream and the other way round, in program order."""
    side = toy.stream(FIRST)
    toy.wait(side, toy.record(None))
    with toy.use_stream(side):
        assert module.current_stream() is side
        event = toy.record(side)
    toy.wait(None, event)
    assert module.calls == [
        "make side0",
        "record default0",
        "side0 waits for default0",
        "enter side0",
        "record side0",
        "leave side0",
        "default0 waits for side0",
    ]


def test_pin_asks_the_tensor(toy: Toy) -> None:
    """Pinning returns what the tensor's own ``pin_memory`` gives."""

    class Host(torch.Tensor):
        def pin_memory(self, device: object = None) -> torch.Tensor:
            return torch.full_like(self, 7).as_subclass(torch.Tensor)

    assert toy.pin(torch.zeros(2).as_subclass(Host)).tolist() == [7, 7]


def test_describe_names_the_device_where_there_is_one(toy: Toy) -> None:
    """People see name, number and memory; without a device only the number."""
    assert toy.describe() == {"devices": "2", "name": "Fake 1000", "memory": "0.0 GiB"}
    assert Toy(FakeDeviceModule(0)).describe() == {"devices": "0"}
