"""Saved activations in a tier that really copies: what comes back, in which order, and that nothing grows."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from powertrain.roles.communicator import Handle
from powertrain.roles.tier import DeviceTier, Lease, Slot, Tier
from powertrain_offload.activations import OffloadedActivations, offload_activations

WIDTH = 16


class FileTier(Tier):
    """Keeps slots in files, moved by plain Python; nothing is moved before somebody waits for it.

    Attributes:
        log: what was done to which slot, in order.
        on_loan: leases that have not ended.
        reserved: slots that were ever reserved.
        freed: slots that were given up.
    """

    name = "file"

    def __init__(self, directory: Path) -> None:
        self.device = torch.device("cpu")
        self.directory = directory
        self.log: list[tuple[str, int]] = []
        self.on_loan = 0
        self.most_on_loan = 0
        self.reserved: list[FileSlot] = []
        self.freed = 0

    def reserve(self, label: str, nbytes: int) -> Slot:
        assert label
        assert nbytes > 0
        slot = FileSlot(self, len(self.reserved), nbytes)
        self.reserved.append(slot)
        return slot

    def did(self, what: str) -> list[int]:
        return [number for done, number in self.log if done == what]


class FileSlot(Slot):
    def __init__(self, tier: FileTier, number: int, nbytes: int) -> None:
        self.tier, self.number, self.nbytes, self.device = tier, number, nbytes, tier.device
        self.path = tier.directory / str(number)
        self.path.write_bytes(b"\xff" * nbytes)
        self.pending: list[Write] = []

    def fetch(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        self.tier.log.append(("fetch", self.number))
        return FileLease(self, start, self.nbytes if stop is None else stop, full=True)

    def blank(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        return FileLease(self, start, self.nbytes if stop is None else stop, full=False)

    def settle(self) -> None:
        while self.pending:
            self.pending[0].wait()

    def free(self) -> None:
        self.settle()
        self.path.unlink()
        self.tier.freed += 1


class FileLease(Lease):
    def __init__(self, slot: FileSlot, start: int, stop: int, *, full: bool) -> None:
        self.slot, self.start, self.stop, self.full = slot, start, stop, full
        self.tensor = torch.full((stop - start,), 0xAA, dtype=torch.uint8)
        self.open = True
        slot.tier.on_loan += 1
        slot.tier.most_on_loan = max(slot.tier.most_on_loan, slot.tier.on_loan)

    def wait(self) -> torch.Tensor:
        assert self.open
        if self.full:
            self.slot.settle()
            self.slot.tier.log.append(("read", self.slot.number))
            with self.slot.path.open("rb") as file:
                file.seek(self.start)
                content = bytearray(file.read(self.stop - self.start))
            self.tensor.copy_(torch.frombuffer(content, dtype=torch.uint8))
            self.full = False
        return self.tensor

    def store(self) -> Handle:
        self._end()
        return Write(self.slot, self.start, self.tensor)

    def release(self) -> None:
        self._end()
        self.tensor.fill_(0xBB)  # it is lent to the next one

    def _end(self) -> None:
        assert self.open
        self.open = False
        self.slot.tier.on_loan -= 1


class Write:
    def __init__(self, slot: FileSlot, start: int, tensor: torch.Tensor) -> None:
        self.slot, self.start, self.tensor = slot, start, tensor
        slot.pending.append(self)

    def wait(self) -> None:
        if self in self.slot.pending:
            self.slot.pending.remove(self)
            with self.slot.path.open("r+b") as file:
                file.seek(self.start)
                file.write(bytes(self.tensor.tolist()))
            self.tensor.fill_(0xCC)

    def done(self) -> bool:
        return self not in self.slot.pending


@pytest.fixture
def tier(tmp_path: Path) -> FileTier:
    return FileTier(tmp_path)


class Block(nn.Module):
    """Saves views of one memory, a mask of another type, and results of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("scale", torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.mix(self.norm(x)).chunk(3, -1)
        mixed = (query @ key.transpose(-1, -2)).softmax(-1) @ value
        gated = torch.where(mixed > 0, mixed.exp(), mixed * self.scale)
        return x + self.drop(self.out(gated.tanh()))


class Model(nn.Module):
    def __init__(self, depth: int = 4, again: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.again = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return x


def make(**kwargs: Any) -> Model:
    torch.manual_seed(1)
    return Model(**kwargs)


def inputs(length: int = 5) -> torch.Tensor:
    return torch.randn(3, length, WIDTH, generator=torch.Generator().manual_seed(2))


def grads(model: nn.Module, length: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    model(inputs(length)).square().sum().backward()
    return [param.grad.clone() for param in model.parameters() if param.grad is not None]


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("prefetch", [0, 1, 3, 100])
def test_the_same_bits(tier: FileTier, prefetch: int, again: bool) -> None:
    """Gradients are those of the plain model, step by step, with and without checkpointing; slots are used again."""
    expected = grads(make(again=again))
    model = make(again=again)
    activations = offload_activations(model, tier, least=1, prefetch=prefetch)
    assert repr(model) == repr(make(again=again))
    assert list(model.state_dict()) == list(make().state_dict())
    for step in range(4):
        assert same(grads(model), expected), step
        assert activations.resting == 0
        assert tier.on_loan == 0
        if step == 0:
            count = len(tier.reserved)
    assert len(tier.reserved) == count > 3
    assert activations.reserved == sum(slot.nbytes for slot in tier.reserved)
    activations.close()
    assert tier.freed == count
    assert activations.reserved == 0
    assert same(grads(model), expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_moves_under_checkpointing(tier: FileTier) -> None:
    """Of a recomputed block the input moves, and nothing else: one slot a block."""
    model = make(depth=6, again=True)
    activations = offload_activations(model, tier, least=1)
    loss = model(inputs()).sum()
    assert activations.resting == 6 * inputs().nbytes
    assert len(tier.reserved) == 6
    loss.backward()
    assert tier.did("read") == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_the_next_ones_are_on_their_way(tier: FileTier, prefetch: int) -> None:
    """When backward waits for one, the fetches of the next ``prefetch`` have begun, and no more."""
    model = make(depth=6, again=True)
    offload_activations(model, tier, least=1, prefetch=prefetch)
    model(inputs()).sum().backward()
    started: list[int] = []
    for done, number in tier.log:
        if done == "fetch":
            started.append(number)
        else:
            assert started == list(range(5, max(number - prefetch, 0) - 1, -1))
    assert tier.most_on_loan == prefetch + 1


def test_memory_is_freed_between_forward_and_backward(tier: FileTier) -> None:
    """What was saved lies in the tier alone: the memory is gone as soon as forward does not need it."""
    watched: list[Any] = []

    class Watch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                x = x * 2
                watched.append(weakref.ref(x.untyped_storage()))
                x = x.sin()
            return x.sum()

    model = Watch()
    x = torch.randn(100, requires_grad=True)
    loss = model(x)
    assert sum(reference() is not None for reference in watched) == 4
    loss.backward()
    expected, x.grad = x.grad, None
    watched.clear()
    activations = offload_activations(model, tier, least=1)
    loss = model(x)
    assert sum(reference() is not None for reference in watched) == 0
    assert activations.resting >= 4 * 400
    loss.backward()
    assert torch.equal(x.grad, expected)
    assert activations.resting == 0


def test_what_stays(tier: FileTier) -> None:
    """Parameters, buffers, inputs, their views and small tensors stay; a pass without gradients moves nothing."""

    class Staying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
            self.register_buffer("mask", torch.rand(4, WIDTH))

        def forward(self, x: torch.Tensor, batch: dict[str, list[torch.Tensor]]) -> torch.Tensor:
            x = x @ self.weight.t()[:, 1:]  # saves both
            return (x * self.mask[:, 1:] * batch["a"][0][:, 1:]).square().sum()

    model = Staying()
    offload_activations(model, tier, least=4 * WIDTH * 3)
    model(torch.randn(4, WIDTH), {"a": [torch.randn(4, WIDTH)]}).backward()
    assert len(tier.reserved) == 1  # what is squared
    model = make()
    activations = offload_activations(model, tier, least=1)
    with torch.no_grad():
        model(inputs())
    assert activations.reserved == 0
    activations.close()
    offload_activations(model, tier, least=10**6)
    before = len(tier.reserved)
    grads(model)
    assert len(tier.reserved) == before


def hooks(tier: Tier, **more: Any) -> OffloadedActivations:
    return OffloadedActivations(tier, **{"least": 1, "prefetch": 1, "keep": lambda tensor: False, **more})


def test_views_of_one_memory_move_once(tier: FileTier) -> None:
    """Slices, transposed and expanded views, and views of another type share one slot, and one fetch."""
    activations = hooks(tier)
    base = torch.arange(60.0).view(6, 10) + torch.zeros((), requires_grad=True)
    views = [base, base[1:], base.t(), base[2, 3:5], base.unsqueeze(0).expand(3, 6, 10), base[:, ::3]]
    factors = [torch.ones(1, requires_grad=True) for _ in views]
    with activations.saving():
        product = sum((view * factor).sum() for view, factor in zip(views, factors, strict=True))
    assert [slot.nbytes for slot in tier.reserved if slot.nbytes > 4] == [240]
    (number,) = [slot.number for slot in tier.reserved if slot.nbytes > 4]
    expected = [view.detach().sum() for view in views]
    product.backward()
    assert tier.did("read").count(number) == 1
    for factor, total in zip(factors, expected, strict=True):
        assert factor.grad is not None
        assert factor.grad.item() == total.item()


def test_a_small_part_of_a_large_memory_moves_alone(tier: FileTier) -> None:
    """Of a memory that is mostly not saved only the part that is moves; strides and types come back as they were."""
    activations = hooks(tier)
    base = torch.randn(1000, 8, dtype=torch.float64)
    part = base[503:505, 1::2]
    factor = torch.ones(1, requires_grad=True, dtype=torch.float64)
    with activations.saving():
        product = part * factor
    assert max(slot.nbytes for slot in tier.reserved) < 64 * 4
    found = product.grad_fn._saved_self
    assert torch.equal(found, part)
    assert found.stride() == part.stride()
    product.sum().backward()
    assert factor.grad is not None
    assert torch.equal(factor.grad, part.sum().view(1))


def test_random_views_come_back(tier: FileTier) -> None:
    """Any strides, offsets and types, through a slot that held something else before."""
    chance = random.Random(7)
    activations = hooks(tier, prefetch=2)
    for _ in range(60):
        dtype = chance.choice([torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.bool])
        base = (torch.randn(4, 6, 5) * 9).to(dtype)
        view = base.permute(chance.sample(range(3), 3))
        for dimension in range(3):
            view = view.narrow(dimension, chance.randrange(2), chance.randrange(1, view.shape[dimension] - 1))
        with activations.saving():
            kept = [activations.pack(view) for _ in range(2)]
        for saved in kept:
            found = activations.unpack(saved)
            assert torch.equal(found, view)
            assert (found.dtype, found.stride()) == (view.dtype, view.stride())
        del kept, saved
        assert activations.resting == 0
        assert activations.reserved < 10 * 960


def test_backward_twice(tier: FileTier) -> None:
    """A graph that is kept is gone back through again, and differentiated once more."""
    expected = []
    for with_tier in (False, True):
        x = torch.randn(30, generator=torch.Generator().manual_seed(4)).requires_grad_()

        class Cube(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return (x * x.sin() * x.exp()).sum()

        model = Cube()
        activations = offload_activations(model, tier, least=1) if with_tier else None
        loss = model(x)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
        expected.append([x.grad, first.detach(), second])
        del loss, first
        if activations is not None:
            gc.collect()
            assert activations.resting == 0
            assert tier.on_loan == 0
    assert same(*expected)


def test_a_graph_that_is_dropped(tier: FileTier) -> None:
    """Forward passes whose backward never comes, or only in part, leave no slot taken and no lease open."""
    model = make()
    activations = offload_activations(model, tier, least=1, prefetch=3)
    for _ in range(3):
        out = model(inputs())
        assert activations.resting > 0
        del out
        assert activations.resting == 0
    count = len(tier.reserved)
    hidden: list[torch.Tensor] = []
    handle = model.blocks[2].register_forward_hook(lambda module, args, output: hidden.append(output))
    out = model(inputs())
    torch.autograd.grad(out.sum(), hidden.pop())
    handle.remove()
    del out
    assert activations.resting == 0
    assert tier.on_loan == 0
    assert len(tier.reserved) == count


def test_several_passes_before_backward(tier: FileTier) -> None:
    """Two passes may be pending, in either order of their backward passes."""
    expected, model = make(), make()
    activations = offload_activations(model, tier, least=1)
    found = []
    for module in (expected, model):
        torch.manual_seed(3)
        module.zero_grad()
        one, two = module(inputs(5)).sum(), module(inputs(7)).square().sum()
        one.backward()
        two.backward()
        found.append([param.grad for param in module.parameters()])
        del one, two
    assert same(*found)
    assert activations.resting == 0


def test_batches_of_many_shapes_do_not_pile_up(tier: FileTier) -> None:
    """Slots of shapes that no longer come are freed."""
    model, plain = make(), make()
    activations = offload_activations(model, tier, least=1)
    sizes = []
    for length in (5, 40, 7, 33, 9, 27, 40, 5, 20, 36):
        assert same(grads(model, length), grads(plain, length))
        sizes.append(activations.reserved)
    grads(model, 40)
    one = max(sizes)
    fresh = offload_activations(plain, tier, least=1)
    grads(plain, 40)
    assert one <= 4 * fresh.reserved
    assert tier.freed > 0


def test_writing_into_what_was_saved(tier: FileTier) -> None:
    """What has moved is as it was when it was saved; what stays raises, as without hooks."""
    activations = hooks(tier)
    x = torch.randn(8, requires_grad=True)
    with activations.saving():
        y = x * 3
        z = (y * y).sum()
    before = y.detach().clone()
    with torch.no_grad():
        y.zero_()
    z.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 6 * before)
    with hooks(tier, least=10**6).saving():
        y = x * 3
        z = (y * y).sum()
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


def test_the_same_memory_saved_before_and_after_a_write(tier: FileTier) -> None:
    """A memory that is written into in between is moved twice, and each time as it was."""
    activations = hooks(tier)
    factors = [torch.ones(1, requires_grad=True) for _ in range(2)]
    x = torch.arange(10.0)
    with activations.saving():
        one = (x * factors[0]).sum()
        x.add_(1)
        two = (x * factors[1]).sum()
    (one + two).backward()
    assert [factor.grad.item() for factor in factors if factor.grad is not None] == [45.0, 55.0]


class Failing(nn.Module):
    def forward(self, x: torch.Tensor, fail: bool) -> torch.Tensor:
        x = x.sin().exp()
        if fail:
            raise ArithmeticError("as the test wants it")
        return x


def test_a_pass_that_fails(tier: FileTier) -> None:
    """After an exception nothing outside the model is moved, and the next pass works."""
    model = Failing()
    activations = offload_activations(model, tier, least=1)
    x = torch.randn(9, requires_grad=True)
    for error in (ArithmeticError, KeyboardInterrupt):
        with pytest.raises(error):
            if error is KeyboardInterrupt:
                with model.register_forward_hook(_interrupt):
                    model(x, False)
            else:
                model(x, True)
        gc.collect()
        count = len(tier.reserved)
        x.sin().exp()
        assert len(tier.reserved) == count
    model(x, False).sum().backward()
    assert x.grad is not None
    gc.collect()
    assert activations.resting == 0


def _interrupt(module: nn.Module, args: Any, output: Any) -> None:
    raise KeyboardInterrupt


def test_a_model_that_is_checkpointed_as_a_whole(tier: FileTier) -> None:
    """Who runs the whole model again in backward gets the same result."""
    expected = grads(make())
    for reentrant in (False, True):
        model = make()
        offload_activations(model, tier, least=1)
        torch.manual_seed(3)
        x = inputs().requires_grad_(reentrant)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        assert same([param.grad for param in model.parameters() if param.grad is not None], expected)


def test_a_copy_is_free(tier: FileTier) -> None:
    """A deep copy of the model moves nothing, also after the tier is gone."""
    model = make()
    activations = offload_activations(model, tier, least=1)
    copied = copy.deepcopy(model)
    assert same(grads(copied), grads(make()))
    assert not tier.reserved
    activations.close()
    assert same(grads(copied), grads(make()))


def test_a_tier_of_the_device_itself() -> None:
    """Where nothing would move, nothing is done."""
    model = make()
    activations = offload_activations(model, DeviceTier(torch.device("cpu")), least=1)
    assert "forward" not in vars(model)
    activations.close()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_compiled_models(tier: FileTier, how: str) -> None:
    """What compiled code saves moves as well."""
    torch.compiler.reset()
    expected, model = grads(make().eval()), make().eval()
    for module in model.blocks if how == "blocks" else [model]:
        module.compile(backend="aot_eager")
    activations = offload_activations(model, tier, least=1)
    for mine, theirs in zip(grads(model), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert len(tier.reserved) > 4
    assert activations.resting == 0
    torch.compiler.reset()


def test_what_a_write_could_not_bring_away_is_told(tier: FileTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of the tier leaves the step as it is raised, and does not hand back wrong numbers."""
    model = make()
    offload_activations(model, tier, least=1)
    loss = model(inputs()).sum()

    def fail(self: FileLease) -> torch.Tensor:
        raise OSError("the disk is gone")

    monkeypatch.setattr(FileLease, "wait", fail)
    with pytest.raises(OSError, match="disk is gone"):
        loss.backward()
