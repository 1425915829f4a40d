"""Copies between the host's memory and a device with memory of its own: in order, beside compute, and never too late.

There is no such device here. ``LazyDevice`` stands for one: work that is not ordered by events goes wrong on it.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy_device import LazyDevice
from torch import nn

import powertrain
from powertrain.hookspecs import hookimpl
from powertrain.plugin import NoConfig, Plugin
from powertrain.roles.tier import Category, Tier
from powertrain.roles.torch_device import TorchDeviceAccelerator
from powertrain.testing.device_module import FakeDeviceModule
from powertrain_offload import host
from powertrain_offload.host import HostTier

DEVICE = torch.device("cpu", 0)
HOST = torch.device("meta")
"""What the host is called here, so that its memory can play the device's as well."""

STEPS = st.lists(
    st.tuples(st.sampled_from(["change", "change", "blank", "drop", "look", "host", "settle"]), st.integers(0, 2**32)),
    min_size=5,
    max_size=40,
)


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host and the device be two."""
    monkeypatch.setattr(host, "_HOST", HOST)


def play(device: LazyDevice, steps: list[tuple[str, int]]) -> None:
    """Let a device, the host and a tier between them work on some slots; check what the host sees."""
    tier = HostTier(device, DEVICE, torch.device("cpu"), 4096)
    draw = random.Random(0)
    slots = [tier.reserve(f"slot {number}", 256) for number in range(3)]
    right = [bytearray(256) for _ in slots]
    for slot in slots:
        slot.fetch(device=HOST).wait().zero_()
    for what, seed in steps:
        draw.seed(seed)
        number = draw.randrange(len(slots))
        slot, model = slots[number], right[number]
        start, stop = sorted((draw.randint(0, 256), draw.randint(0, 256)))
        value = draw.randrange(1, 256)
        if what == "settle":
            tier.settle()
            for other, content in zip(slots, right, strict=True):
                assert bytes(other.memory.numpy()) == content
        elif what == "host":
            tensor = slot.fetch(start, stop, HOST).wait()
            assert bytes(tensor.numpy()) == model[start:stop]
            tensor.fill_(value)
            model[start:stop] = bytes([value]) * (stop - start)
        else:
            use(device, slot, what, start, stop, value, model)
        device.drift(draw)
    tier.settle()
    for slot, content in zip(slots, right, strict=True):
        assert bytes(slot.memory.numpy()) == content
    device.everything()


def use(device: LazyDevice, slot: Any, what: str, start: int, stop: int, value: int, model: bytearray) -> None:
    """Let the device do something with a range of a slot; the host goes on at once."""
    with device.copying():
        lease = (slot.blank if what == "blank" else slot.fetch)(start, stop)
    if what == "drop":  # nobody needs it after all, while it is on its way
        lease.release()
        return
    tensor = lease.wait()
    if what == "look":
        seen, before = torch.zeros(stop - start, dtype=torch.uint8), bytes(model[start:stop])
        device.compute([tensor], seen.copy_)
        device.compute([], lambda: check(seen, before))
        lease.release()
        return
    if what == "blank":
        device.compute([tensor], lambda same: same.fill_(value))
        model[start:stop] = bytes([value]) * (stop - start)
    else:
        device.compute([tensor], lambda same: same.add_(value))
        model[start:stop] = bytes((byte + value) % 256 for byte in model[start:stop])
    del tensor
    with device.copying():
        lease.store()


def check(seen: torch.Tensor, right: bytes) -> None:
    assert bytes(seen.numpy()) == right, "the device has computed with what was not there yet"


@settings(max_examples=200, deadline=None)
@given(steps=STEPS)
def test_whatever_goes_on_at_once_ends_as_if_one_after_the_other(steps: list[tuple[str, int]]) -> None:
    """Streams run as late and as early as they may; values are right, and no memory is used by two."""
    device = LazyDevice()
    play(device, steps)
    assert device.races == []
    assert device.host_waits["everything"] == 0
    assert device.pinned == [256] * 3, "memory is page-locked once, when it is reserved"


class SharesNothing(LazyDevice):
    def share(self, tensor: torch.Tensor, stream: Any) -> None:
        pass


class ComputesAtOnce(LazyDevice):
    """The compute stream waits for no copy."""

    def wait(self, stream: Any, event: Any) -> None:
        if stream is not None:
            super().wait(stream, event)


class CopiesAtOnce(LazyDevice):
    """The copying stream does not wait for what is computed."""

    def wait(self, stream: Any, event: Any) -> None:
        if stream is None:
            super().wait(stream, event)


class ReadsAtOnce(LazyDevice):
    """The host waits for nothing."""

    def finish(self, event: Any) -> None:
        pass


class AllocatesAnywhere(LazyDevice):
    """Memory comes from the compute stream's, whatever stream asks."""

    def allocated(self, tensor: torch.Tensor) -> None:
        with self.use_stream(self.default):
            super().allocated(tensor)


@pytest.mark.parametrize("fault", [SharesNothing, ComputesAtOnce, CopiesAtOnce, ReadsAtOnce, AllocatesAnywhere])
def test_the_lazy_device_finds_what_is_not_ordered(fault: type[LazyDevice]) -> None:
    """Each of the calls that order work is needed: without it, something is found to go wrong."""
    found = 0
    for seed in range(200):
        draw, device = random.Random(seed), fault()
        kinds = ["change", "change", "blank", "drop", "look", "host", "settle"]
        steps = [(draw.choice(kinds), draw.getrandbits(32)) for _ in range(20)]
        try:
            play(device, steps)
        except AssertionError:
            found += 1
        else:
            found += bool(device.races)
    assert found > 5


# --- the same calls, one by one, on the fake of torch's device module ----------------------------


class Books(TorchDeviceAccelerator):
    """An accelerator over the fake, whose tensors are the host's."""

    name = "books"
    device_type = "cpu"

    def share(self, tensor: torch.Tensor, stream: Any) -> None:
        name = self.module.current_stream().name if stream is None else stream.name
        self.module.calls.append(f"share with {name}")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.module.calls.append(f"pin {tensor.numel()}")
        return tensor.clone()


def test_the_calls_of_a_fetch_and_a_store() -> None:
    """Copies are queued on a stream of the tier's own; compute and copies wait by events, and the host for nothing."""
    module = FakeDeviceModule(1)
    tier = HostTier(Books(module), DEVICE, torch.device("cpu"), 4096)
    slot = tier.reserve("piece", 100)
    assert module.calls == ["make side0", "pin 100"]
    module.calls.clear()
    lease = slot.fetch()
    assert module.calls == ["enter side0", "record side0", "leave side0"]
    module.calls.clear()
    lease.wait()
    lease.wait()
    assert module.calls == ["default0 waits for side0", "share with default0"]
    module.calls.clear()
    lease.store()
    assert module.calls == [
        "record default0",
        "enter side0",
        "side0 waits for default0",
        "share with side0",
        "record side0",
        "leave side0",
    ]
    module.calls.clear()
    slot.fetch(device=HOST).wait()
    slot.fetch(device=HOST).wait()
    assert module.calls == ["host waits for side0"]
    module.calls.clear()
    tier.settle()
    assert module.calls == ["record side0", "host waits for side0"]


def test_the_allocator_is_told_by_torchs_own_call() -> None:
    """``share`` is ``record_stream``, on the stream that is given or the current one."""

    class Tensor:
        def record_stream(self, stream: Any) -> None:
            module.calls.append(f"record_stream {stream.name}")

    class Plain(TorchDeviceAccelerator):
        name, device_type = "plain", "cpu"

    module = FakeDeviceModule(1)
    accelerator = Plain(module)
    accelerator.share(Tensor(), accelerator.stream(DEVICE))  # type: ignore[arg-type]
    accelerator.share(Tensor(), None)  # type: ignore[arg-type]
    assert module.calls == ["make side0", "record_stream side0", "record_stream default0"]


def test_a_device_without_streams_copies_and_waits() -> None:
    """Without streams, a copy is over when the call returns, and the same calls do nothing."""
    from powertrain.testing.null import NullHost

    accelerator = NullHost()
    tier = HostTier(accelerator, DEVICE, torch.device("cpu"), 4096)
    slot = tier.reserve("piece", 100)
    lease = slot.blank()
    lease.wait().fill_(3)
    lease.store()
    assert bytes(slot.memory.numpy()) == bytes([3]) * 100
    accelerator.share(lease.tensor, None)
    assert accelerator.calls == []


# --- an engine on such a device -------------------------------------------------------------------


class InHostMemory(Plugin[NoConfig]):
    """Lets categories rest in the host's memory, for a device that has its own."""

    name, api = "in-host-memory", 1

    def __init__(self, categories: tuple[Category, ...], grain: int) -> None:
        super().__init__(NoConfig())
        self.categories, self.grain = categories, grain
        self.module = FakeDeviceModule(1)

    @hookimpl
    def make_tier(self, category: Category) -> Tier | None:
        if category not in self.categories:
            return None
        return HostTier(Books(self.module), DEVICE, torch.device("cpu"), self.grain)


def trained(stage: int, plugins: list[Plugin[Any]], compute: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 70), nn.Tanh(), nn.Linear(70, 70), nn.Tanh(), nn.Linear(70, 5))
    config = {"zero": {"stage": stage}, "precision": {"compute": compute}, "optimizer": {"lr": 1e-2, "clip": 0.1}}
    batch = torch.randn(16, 12), torch.randint(0, 5, (16,))
    with powertrain.initialize(model, config, loss_fn=nn.CrossEntropyLoss(), plugins=plugins) as engine:
        losses = [float(engine.train_step(batch)) for _ in range(4)]
        with powertrain.full(engine.module):
            found = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    return found | {"losses": torch.tensor(losses)}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("used", ["on the device", "on the host"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_gets_the_same_bits(monkeypatch: pytest.MonkeyPatch, stage: int, used: str, compute: str) -> None:
    """State that rests in the host's memory, updated there or fetched by the device, trains as on the device."""
    if used == "on the host":
        monkeypatch.setattr(host, "_HOST", torch.device("cpu"))
    categories: tuple[Category, ...] = ("optimizer", "gradients", "parameters")
    plugin = InHostMemory(categories[:stage], 4096)
    near, far = trained(stage, [], compute), trained(stage, [plugin], compute)
    assert near.keys() == far.keys()
    assert all(torch.equal(near[name], far[name]) for name in near)
    if compute == "bf16" or used == "on the device":  # else masters are the parameters, and lie there anyway
        assert any(call.startswith("pin ") for call in plugin.module.calls)
    assert ("enter side0" in plugin.module.calls) == (used == "on the device")
    assert not [call for call in plugin.module.calls if call.startswith("synchronize")]
