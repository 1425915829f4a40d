"""Deferred construction: no memory while building, and the bits of the eager construction afterwards."""

from __future__ import annotations

import gc
import math
import random
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import powertrain
from powertrain.birth import Birth, settle
from powertrain.compat import TorchDispatchMode
from powertrain.errors import BirthError
from powertrain.tape import entry_of

CPU = torch.device("cpu")
Build = Callable[[], nn.Module]


class GPT(nn.Module):
    """As examples/gpt: an initialisation loop that overwrites what the layers drew, and a tied head."""

    def __init__(self, width: int = 12, depth: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(31, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"a": nn.Linear(width, width), "b": nn.LayerNorm(width)}) for _ in range(depth)
        )
        self.head = nn.Linear(width, 31, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 * ((2 * depth) ** -0.5 if name.endswith("a.weight") else 1.0))
        self.head.weight = self.token.weight
        self.token.weight.data[3].zero_()


class Rotary(nn.Module):
    """Buffers from arange and an outer product, a causal mask, and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        inverse = 1.0 / (10000 ** (torch.arange(0, 8, 2, dtype=torch.int64).float() / 8))
        angles = torch.outer(torch.arange(16).float(), inverse)
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())
        self.register_buffer("mask", torch.tril(torch.ones(5, 5, dtype=torch.bool)).view(1, 1, 5, 5))
        self.register_buffer("constant", torch.tensor([1.0, 2.0]))
        self.table = torch.polar(torch.ones_like(angles), angles)
        self.pair = (angles, angles[1:, ::2])
        self.project = nn.Linear(3, 4, device=inverse.device)


def initialised(*steps: Callable[[torch.Tensor], Any]) -> Build:
    def build() -> nn.Module:
        layer = nn.Linear(20, 33)
        for step in steps:
            step(layer.weight)
        return layer

    return build


def views() -> nn.Module:
    layer = nn.Linear(6, 8)
    layer.weight.data[[1, 4]].zero_()  # indexing copies: changes nothing
    layer.weight.data[torch.tensor([1, 4])] = 0.5
    layer.weight.data.t()[2:4].normal_()
    with torch.no_grad():
        query, key = layer.weight.chunk(2, 1)
        query.copy_(torch.randn_like(query) @ torch.ones(3, 3))
        key.mul_(2).add_(query)
        layer.bias[1:3].fill_(7)
        layer.bias.add_(layer.weight.sum(1))
        layer.bias[0] = layer.bias[4] * 2
    layer.register_buffer("lower", layer.weight.detach()[:3, :3].tril().clone())
    return layer


def generators() -> nn.Module:
    """Saving, restoring and seeding generators in the middle, and one of its own."""
    own = torch.Generator().manual_seed(9)
    layers = [nn.Linear(3, 5)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers.append(nn.Linear(3, 5))
        torch.manual_seed(1)
        layers.append(nn.Linear(3, 5))
    layers.append(nn.Linear(3, 5))
    nn.init.normal_(layers[0].bias, generator=own)
    own.manual_seed(9)
    nn.init.uniform_(layers[1].bias, generator=own)
    nn.init.trunc_normal_(layers[2].weight, generator=own)
    state = torch.get_rng_state()
    nn.init.normal_(layers[3].weight)
    torch.set_rng_state(state)
    nn.init.normal_(layers[3].bias)
    return nn.ModuleList(layers)


def dependent_draws() -> nn.Module:
    """Draws whose number depends on the values that they are given."""
    layer = nn.Linear(7, 9)
    with torch.no_grad():
        layer.weight.copy_(torch.poisson(layer.weight.abs() * 30))
        layer.bias.copy_(torch.bernoulli(torch.rand(9)) + torch.multinomial(torch.rand(20), 9))
    return nn.Sequential(layer, nn.Linear(9, 7))


def half_precision_default() -> nn.Module:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = nn.Linear(4, 6)
        layer.register_buffer("third", torch.arange(5) / 3)
    finally:
        torch.set_default_dtype(torch.float32)
    return layer


def on_meta() -> nn.Module:
    """Code that asks for the device of a parameter and builds on it."""
    layer = nn.Linear(4, 6)
    assert not layer.weight.is_meta
    layer.register_buffer("ones", torch.ones(3, device=layer.weight.device))
    layer.register_buffer(
        "given", layer.weight.new_tensor([1, 2]) + torch.tensor([3.0, 4.0], device=layer.weight.device)
    )
    layer.register_buffer("new", layer.weight.new_full((3,), 2.5))
    return layer


MODELS: dict[str, Build] = {
    "linear": lambda: nn.Linear(5, 7),
    "embedding": lambda: nn.Embedding(11, 6, padding_idx=4),
    "norm": lambda: nn.LayerNorm(7),
    "conv": lambda: nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),
    "batch norm": lambda: nn.BatchNorm1d(5),
    "attention": lambda: nn.MultiheadAttention(12, 3),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    "lstm": lambda: nn.LSTM(4, 6, 2, bidirectional=True),
    "gpt": GPT,
    "rotary": Rotary,
    "orthogonal": initialised(nn.init.orthogonal_),
    "trunc_normal": initialised(lambda w: nn.init.trunc_normal_(w, std=0.02)),
    "trunc_normal tail": initialised(lambda w: nn.init.trunc_normal_(w, 0.0, 1.0, 1.0, 2.0)),
    "kaiming then xavier": initialised(nn.init.kaiming_normal_, nn.init.xavier_uniform_),
    "sparse": initialised(lambda w: nn.init.sparse_(w, 0.3)),
    "eye": initialised(nn.init.eye_),
    "views": views,
    "generators": generators,
    "dependent draws": dependent_draws,
    "default type": half_precision_default,
    "to bfloat16": lambda: nn.Linear(5, 7).to(torch.bfloat16),
    "half": lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).half(),
    "moved": lambda: nn.Linear(5, 7).to("cpu"),
    "own device": on_meta,
    "legacy": lambda: nn.ParameterList([torch.Tensor(3, 4).uniform_(), torch.FloatTensor([1, 2])]),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 7)),
}  # fmt: skip


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def twins(build: Build, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Return the model built eagerly and deferred, under one seed."""
    torch.manual_seed(seed)
    eager = build()
    torch.manual_seed(seed)
    with powertrain.deferred():
        late = build()
    torch.manual_seed(seed + 1)  # whatever happens between
    return eager, late


def same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return mine.dtype == theirs.dtype and mine.stride() == theirs.stride() and torch.equal(mine, theirs)


def value(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return Birth().whole(name, tensor, CPU)


@pytest.mark.parametrize("order", [None, 1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_value_is_that_of_the_eager_construction(name: str, order: int | None) -> None:
    """Parameters and buffers are bit-equal, in the model's order and in any other."""
    eager, late = twins(MODELS[name])
    want, found = tensors(eager), tensors(late)
    assert want.keys() == found.keys()
    names = list(want)
    if order is not None:
        random.Random(order).shuffle(names)
    for key in names:
        assert same(value(key, found[key]), want[key].detach()), key


@pytest.mark.parametrize("name", MODELS)
def test_one_parameter_alone(name: str) -> None:
    """A tape that was never asked before gives any single parameter, and any slice of it."""
    torch.manual_seed(0)
    eager = tensors(MODELS[name]())
    for key, want in eager.items():
        found = tensors(twins(MODELS[name])[1])[key]
        start, stop = want.numel() // 3, want.numel() - want.numel() // 4
        target = torch.empty(stop - start, dtype=torch.float64)
        Birth().fill(key, found, target, start)
        assert torch.equal(target, want.detach().reshape(-1)[start:stop].double()), key


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_allocated_and_no_generator_moves(name: str) -> None:
    """Parameters rest on the meta device, and building and making leave the default generator as it was."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with powertrain.deferred():
        model = MODELS[name]()
    assert all(param.is_meta for param in model.parameters() if param.dtype != torch.float32 or param.numel() > 2)
    if name != "generators":
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.initial_seed() == 3
    torch.manual_seed(4)
    state = torch.get_rng_state()
    for key, param in model.named_parameters():
        value(key, param)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_of_the_callers_own_is_as_it_was() -> None:
    """A generator that is passed to an initialiser is left in the state that it had."""
    own = torch.Generator().manual_seed(5)
    state = own.get_state()
    with powertrain.deferred():
        nn.init.normal_(nn.Linear(3, 4).weight, generator=own)
    assert torch.equal(own.get_state(), state)


def test_tied_parameters_stay_tied() -> None:
    """One Parameter under two names becomes one real Parameter, and keeps its attributes."""
    eager, late = twins(GPT)
    weight = late.token.weight
    weight.note = "kept"
    Birth().make("token.weight", weight, CPU)
    assert late.head.weight is late.token.weight is weight
    assert weight.note == "kept"
    assert isinstance(weight, nn.Parameter)
    assert not weight.is_meta
    assert torch.equal(weight, eager.token.weight)


def test_blocks_in_blocks_and_real_modules() -> None:
    """A nested block records into the outer one; what was built outside is ordinary, and may be read."""
    torch.manual_seed(0)
    outside = nn.Linear(300, 100)

    def build() -> nn.Module:
        first = nn.Linear(3, 4)
        with powertrain.deferred():
            second = nn.Linear(300, 100)
        with torch.no_grad():
            second.weight.copy_(outside.weight).mul_(2)
        return nn.Sequential(first, second, outside)

    torch.manual_seed(1)
    with powertrain.deferred():
        late = build()
    torch.manual_seed(1)
    first, second = nn.Linear(3, 4), nn.Linear(300, 100)
    assert not outside.weight.is_meta
    assert same(value("0.weight", late[0].weight), first.weight.detach())
    assert same(value("1.bias", late[1].bias), second.bias.detach())
    assert same(value("1.weight", late[1].weight), outside.weight.detach() * 2)


def test_a_real_tensor_takes_real_values() -> None:
    """A deferred value written into a real tensor, and a draw into one, are what they were."""

    def build() -> nn.Module:
        layer = nn.Linear(3, 4)
        real = torch.tensor([0.0] * 6)
        real[:3] = layer.weight[1]
        real[3:].normal_()
        layer.register_buffer("real", real)
        layer.last = nn.Linear(2, 2)
        return layer

    with torch.no_grad():
        eager, late = twins(build)
    assert not late.real.is_meta
    assert torch.equal(late.real, eager.real)
    assert torch.equal(value("last", late.last.weight), eager.last.weight)


# --- what is refused -----------------------------------------------------------------------


def item() -> nn.Module:
    return nn.Linear(3, int(torch.rand(3).sum().item()))


def listed() -> nn.Module:
    return nn.Linear(3, len(torch.rand(3).tolist()))


def branch() -> nn.Module:
    return nn.Linear(3, 4 if torch.rand(1) > 0.5 else 5)


def found() -> nn.Module:
    return nn.Linear(3, len(torch.rand(3).nonzero()))


def compared() -> nn.Module:
    return nn.Linear(3, 1 + torch.equal(torch.rand(3), torch.ones(3)))


def as_array() -> nn.Module:
    return nn.Linear(3, len(torch.rand(3).numpy()))


@pytest.mark.parametrize("build", [item, listed, branch, found, compared, as_array])
def test_construction_that_depends_on_values_is_refused(build: Build) -> None:
    """The error names the line of the model, and says what to do; the generator is put back."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(BirthError) as caught, powertrain.deferred():
        build()
    line = build.__code__.co_firstlineno + 1
    assert caught.value.where == f"{Path(__file__)}:{line}"
    assert "outside of powertrain.deferred()" in caught.value.remedy
    assert torch.equal(torch.get_rng_state(), state)


def test_real_values_may_be_asked_for() -> None:
    """torch.tensor of numbers is real inside the block, with all that is computed from it."""
    with powertrain.deferred():
        numbers = torch.tensor([1.0, 4.0]).sqrt()
        assert numbers.tolist() == [1.0, 2.0]
        assert bool(numbers.sum() == 3)


def test_a_large_constant_must_not_change() -> None:
    """A tensor that the construction read, too large to be kept, is refused once it was written to."""
    large, small = torch.randn(200, 200), torch.ones(4)
    with powertrain.deferred(), torch.no_grad():
        layer = nn.Linear(200, 200)
        layer.weight.copy_(large)
        layer.bias[:4].copy_(small)
    before = large.clone()
    assert torch.equal(value("weight", layer.weight), before)
    large.zero_()
    small.zero_()
    assert torch.equal(value("bias", layer.bias)[:4], torch.ones(4))
    with pytest.raises(BirthError, match="changed before"):
        value("weight", layer.weight)


def test_the_tensors_of_two_blocks_do_not_mix() -> None:
    """Reading the content of another block's parameter is refused; holding it is not."""
    with powertrain.deferred():
        first = nn.Linear(3, 3)
    with pytest.raises(BirthError, match="not made in this block"), powertrain.deferred():
        second = nn.Linear(3, 3)
        second.weight.data.copy_(first.weight)
    with pytest.raises(BirthError, match="not made in this block"), powertrain.deferred():
        nn.init.trunc_normal_(first.weight)
    with powertrain.deferred():
        second = nn.Linear(3, 3)
        second.weight = first.weight
    assert entry_of(second.weight) is entry_of(first.weight)


# --- memory ----------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of real storages that are alive, and keeps the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.forget, id(storage), storage.nbytes())

    def forget(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.bytes -= nbytes


def test_memory_is_that_of_one_parameter() -> None:
    """Making all of a model, in the worst order, holds one parameter and as much scratch; then nothing."""
    with powertrain.deferred():
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(20)))
        for layer in model:
            nn.init.trunc_normal_(layer.weight, std=0.02)
    largest = 256 * 256 * 4
    target = torch.empty(100)
    with Live() as live:
        for key, param in reversed(list(model.named_parameters())):
            Birth().fill(key, param, target)
    gc.collect()
    assert largest <= live.peak <= 5 * largest  # trunc_normal_ itself holds up to four
    assert live.bytes < largest // 2  # the states of the generator
    with powertrain.deferred():
        plain = nn.Sequential(*(nn.Linear(256, 256) for _ in range(20)))
    with Live() as live:
        for key, param in reversed(list(plain.named_parameters())):
            Birth().fill(key, param, target)
    assert largest <= live.peak <= 2 * largest + 2**18


def test_what_is_overwritten_is_not_computed() -> None:
    """A first value that a later one replaces costs nothing when the parameter is made."""
    with powertrain.deferred():
        layer = nn.Linear(8, 8)
        nn.init.zeros_(layer.weight)
    calls: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        value("weight", layer.weight)
    assert any("fill_" in call or "zero_" in call for call in calls)
    assert not any("uniform_" in call for call in calls)


# --- in an engine ----------------------------------------------------------------------------


class Scored(nn.Module):
    """Rotary and GPT parts that a step runs through."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = Rotary()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        nn.init.trunc_normal_(self.body[0].weight, std=0.1)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = torch.view_as_complex(x.view(-1, 4, 2).float()) * self.rotary.table[1]
        x = torch.view_as_real(turned).flatten(1).to(x.dtype) * self.rotary.cos[2] + self.rotary.pair[0].sum()
        return self.frozen(self.body(x)).float().square().mean()


def trained(build: Build, config: dict[str, Any], *, defer: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(7)
    if defer:
        with powertrain.deferred():
            model = build()
    else:
        model = build()
    held = list(model.parameters())
    engine = powertrain.initialize(model, config)
    with engine:
        assert all(mine is theirs for mine, theirs in zip(model.parameters(), held, strict=True))
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        losses = [float(engine.train_step((batch,))) for _ in range(3)]
    return losses, {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_an_engine_trains_a_deferred_model_as_any_other(compute: str) -> None:
    """Losses, parameters and buffers are bit-equal, plain tensor attributes included."""
    config = {"precision": {"compute": compute}}
    mine, theirs = trained(Scored, config, defer=True), trained(Scored, config, defer=False)
    assert mine[0] == theirs[0]
    assert all(math.isfinite(loss) for loss in mine[0])
    assert mine[1].keys() == theirs[1].keys()
    assert all(same(mine[1][name], theirs[1][name]) for name in mine[1])


def test_an_optimizer_made_before_keeps_its_parameters() -> None:
    """An optimizer over deferred parameters updates the real ones."""
    torch.manual_seed(0)
    with powertrain.deferred():
        model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with powertrain.initialize(model, loss_fn=lambda output, _: output.mean(), optimizer=optimizer) as engine:
        before = model.weight.detach().clone()
        engine.train_step((torch.ones(2, 8), torch.ones(2)))
        assert not torch.equal(model.weight, before)


def test_a_meta_model_without_values_is_refused() -> None:
    """torch.device('meta'), and a change after the block, end in words that name tensors and the remedy."""
    with torch.device("meta"):
        model = nn.Linear(8, 4)
    with pytest.raises(BirthError, match=re.escape("powertrain.deferred()")) as caught:
        powertrain.initialize(model)
    assert "weight, bias" in str(caught.value)
    assert "weights=" in str(caught.value)
    with powertrain.deferred():
        model = nn.Linear(8, 4)
    with pytest.raises(BirthError, match="nothing tells their first values"):
        powertrain.initialize(model.half())


def test_state_made_without_memory_is_refused() -> None:
    """An optimizer that makes its state of deferred parameters at once is named."""
    with powertrain.deferred():
        model = nn.Linear(8, 4)
    with pytest.raises(BirthError, match="optimizer"):
        powertrain.initialize(model, {"optimizer": {"name": "adagrad", "lr": 0.1}})


def test_settling_a_parameter_that_autograd_holds_is_refused() -> None:
    """A weak reference keeps torch from giving a parameter memory: an error that says so."""
    with powertrain.deferred():
        layer = nn.Linear(2, 2)
    held = weakref.ref(layer.weight)
    with pytest.raises(BirthError, match="weak reference"):
        settle(layer.weight, torch.zeros(2, 2))
    assert held() is layer.weight


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave the default generator of the process as it was."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
