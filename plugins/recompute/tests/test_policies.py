"""What each policy recomputes, that it changes no number, and that the model stays what it is."""

from __future__ import annotations

import copy
import logging
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from powertrain import initialize, nest
from powertrain.compat import TorchDispatchMode
from powertrain.forward import Detour
from powertrain_recompute.config import RecomputeConfig
from powertrain_recompute.transform import recompute

WIDTH, DEPTH = 16, 6
CPU = torch.device("cpu")


class Block(nn.Module):
    """Attention, a perceptron and dropout; counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.inner = nn.Linear(WIDTH, 4 * WIDTH)
        self.outer = nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        heads = self.mix(self.norm(x)).unsqueeze(1).chunk(3, -1)
        x = x + self.drop(nn.functional.scaled_dot_product_attention(*heads).squeeze(1))
        return x + self.drop(self.outer(nn.functional.gelu(self.inner(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make() -> Model:
    torch.manual_seed(1)
    return Model()


def batch() -> torch.Tensor:
    return torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(2))


def grads(model: nn.Module, x: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Return the gradients of one pass, with the same dropout every time."""
    torch.manual_seed(3)
    model.zero_grad()
    model(batch() if x is None else x).square().sum().backward()
    return [param.grad.clone() for param in model.parameters() if param.grad is not None]


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


def kept(model: nn.Module) -> int:
    """Return the bytes that autograd keeps of a forward pass, parameters not counted."""
    params = {id(param.untyped_storage()) for param in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in params:
            found[id(storage)] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch())
    return sum(storage.nbytes() for storage in found.values())


class Watch(TorchDispatchMode):
    """Remembers the memory of what operators return, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in nest.tensors(result):
            self.seen.add(tensor.untyped_storage())
        return result


def alive(model: nn.Module) -> int:
    """Return the bytes of all that was computed and lives when the loss is there, whoever holds it."""
    watch = Watch()
    with watch:
        loss = model(batch()).square().sum()
    params = {id(param.untyped_storage()) for param in model.parameters()}
    found = sum(storage.nbytes() for storage in watch.seen if id(storage) not in params)
    loss.backward()
    return found


class Count(TorchDispatchMode):
    """Counts the calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def calls(model: nn.Module) -> dict[str, int]:
    """Return how often each operator ran, forward and backward."""
    counter = Count()
    with counter:
        grads(model)
    return counter.calls


def start(model: nn.Module, **table: Any) -> list[Callable[[], None]]:
    return recompute(model, RecomputeConfig(**table), CPU, backend="aot_eager_decomp_partition")


compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
"""The compiler asks for it, and hides the warning from all but those who raise on warnings."""

EAGER: list[dict[str, Any]] = [
    {"policy": "none"},
    {"policy": "full"},
    {"policy": "every", "every": 2},
    {"policy": "selective"},
    {"policy": "selective", "save": ["aten.addmm.default", "norm"]},
    {"blocks": ["blocks.1", "blocks.[34]"]},
]


@pytest.mark.parametrize("table", EAGER, ids=str)
def test_no_policy_changes_a_bit(table: dict[str, Any]) -> None:
    """Gradients are those of the plain model, with dropout, once and again; nothing of the model has another name."""
    model, plain = make(), make()
    undo = start(model, **table)
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert type(model.blocks[0]) is Block
    expected = grads(plain)
    assert same(grads(model), expected)
    assert same(grads(model), expected)
    for step in undo:
        step()
    assert same(grads(model), expected)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("table", "again"),
    [
        ({"policy": "none"}, []),
        ({"policy": "full"}, [0, 1, 2, 3, 4, 5]),
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"policy": "every"}, [0, 2, 4]),
        ({"policy": "every", "every": 4}, [0, 4]),
        ({"policy": "every", "every": 1}, [0, 1, 2, 3, 4, 5]),
        ({"policy": "every", "every": 2, "blocks": ["blocks.[2345]"]}, [2, 4]),
        ({"policy": "selective"}, [0, 1, 2, 3, 4, 5]),
        ({"blocks": "Block"}, [0, 1, 2, 3, 4, 5]),
        ({"blocks": "blocks.3"}, [3]),
    ],
    ids=str,
)
def test_the_blocks_that_run_again(table: dict[str, Any], again: list[int]) -> None:
    """Each policy runs the blocks that it says twice, the others once."""
    model = make()
    start(model, **table)
    grads(model)
    assert [block.runs for block in model.blocks] == [2 if number in again else 1 for number in range(DEPTH)]


def test_less_is_kept() -> None:
    """Of a recomputed block only what goes in is kept: the activations fall to that, in proportion to the blocks."""
    sizes = {}
    for every in (1, 2, 3):
        model = make()
        start(model, policy="every", every=every)
        sizes[every] = kept(model)
    plain, inputs = kept(make()), 4 * DEPTH * 8 * 5 * WIDTH
    assert sizes[1] < sizes[2] < sizes[3] < plain
    assert sizes[1] < 1.5 * inputs < plain / 8
    assert abs(sizes[2] - (plain + sizes[1]) / 2) < 0.1 * plain


def test_selective_keeps_what_it_saves() -> None:
    """The memory that lives between forward and backward: what is saved beside what goes in, and less than all."""
    sizes = {}
    for save in (["norm"], ["mm"], ["mm", "sdpa"], ["mm", "sdpa", "norm", "aten.gelu"]):
        model = make()
        start(model, policy="selective", save=save)
        sizes[len(save), save[0]] = alive(model)
    model = make()
    start(model)
    full, plain = alive(model), alive(make())
    rows = 4 * 8 * 5
    assert full < sizes[1, "norm"] < sizes[1, "mm"] < sizes[2, "mm"] < sizes[4, "mm"] < plain
    # Of each block, what its three linear layers return.
    assert sizes[1, "mm"] - full == DEPTH * rows * (3 + 4 + 1) * WIDTH


def test_selective_runs_nothing_twice_that_it_saves() -> None:
    """Operators whose results are kept run as often as without recomputation, the others again."""
    plain = calls(make())
    linear, attention = "aten.addmm.default", "aten._scaled_dot_product_flash_attention_for_cpu.default"
    gelu = "aten.gelu.default"
    assert (plain[gelu], plain[attention]) == (DEPTH, DEPTH)
    for save, again in [(None, [gelu]), (["sdpa"], [gelu, linear]), (["mm", "aten.gelu"], [attention])]:
        model = make()
        start(model, policy="selective", save=save)
        found = calls(model)
        for name in (linear, attention, gelu):
            if name in again:
                assert found[name] >= plain[name] + DEPTH, (save, name)
            else:
                assert found[name] == plain[name], (save, name)


@compiles
def test_a_budget_bounds_what_is_kept() -> None:
    """Compiled blocks keep less the smaller the budget, down to their inputs; results agree to rounding."""
    model = make().eval()  # a compiler draws other random numbers
    expected, sizes = grads(model), []
    for budget in (0.0, 0.4, 1.0):
        torch.compiler.reset()
        undo = start(model, policy="budget", budget=budget)
        sizes.append(kept(model))
        for mine, theirs in zip(grads(model), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        with torch.no_grad():
            model(batch())
        undo.pop()()
        for step in undo:
            step()
    assert sizes[0] < 0.8 * sizes[1] < 0.8 * 0.8 * sizes[2]
    torch.compiler.reset()


def test_without_gradients_nothing_is_spent() -> None:
    """Under no_grad the blocks run as they are, in train and in eval mode."""
    model = make()
    start(model)
    hooks: list[str] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: hooks.append("saved"), lambda t: t):
        state = torch.get_rng_state()
        for mode in (True, False):
            model.train(mode)(batch())
    assert not hooks
    assert [block.runs for block in model.blocks] == [2] * DEPTH
    torch.set_rng_state(state)


def test_eval_mode_with_gradients() -> None:
    """A model in eval mode that is differentiated all the same is recomputed, without dropout."""
    model, plain = make().eval(), make().eval()
    start(model)
    assert same(grads(model), grads(plain))


def test_copies_are_models_of_their_own() -> None:
    """A deep copy, and one through pickle, recompute by themselves and share nothing with the original."""
    for policy in ("full", "selective"):
        model = make()
        start(model, policy=policy)
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        assert same(grads(copied), grads(make()))
        assert [block.runs for block in copied.blocks] == [2] * DEPTH
        assert not any(block.runs for block in model.blocks)
        assert isinstance(vars(copied.blocks[0])["forward"], Detour)
    model = make()
    start(model)
    assert same(grads(pickle.loads(pickle.dumps(model))), grads(make()))


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_backward_twice(policy: str) -> None:
    """A graph that is kept is gone back through again, also where results were kept: they are computed then."""
    model, plain = make(), make()
    start(model, policy=policy)
    found = []
    for module in (plain, model):
        torch.manual_seed(3)
        loss = module(batch()).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([param.grad for param in module.parameters() if param.grad is not None])
    assert same(*found)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu_()


def test_a_kept_result_that_the_block_writes_into() -> None:
    """It is no result any more: backward says so, and which operator it was."""
    model = nn.Sequential(Overwriting(), Overwriting())
    start(model, policy="selective")
    with pytest.raises(RuntimeError, match=r"aten\.addmm\.default.*modified by an inplace operation"):
        model(torch.randn(2, 4)).sum().backward()


class Wide(nn.Module):
    """A block with every kind of argument and result, which writes into a list, and is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True)

    def forward(self, query: Any, key: Any, *, scale: Any, pair: Any, log: list[Any], flag: str) -> Any:
        log.append(flag)
        mixed, _ = self.attention(query, key, key, need_weights=False)
        return {"x": self.inner(mixed) * scale + pair[0] - pair[1][0], "flag": flag, "none": None}


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wide() for _ in range(2))
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.log: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks, self.blocks[0]]:
            pair = (x.tanh(), (x.sin(), "text"))
            x = block(x, x, scale=self.scale, pair=pair, log=self.log, flag="a")["x"]
        return x


def test_any_arguments_and_results() -> None:
    """Keyword arguments, nests, objects, results that are no tensors, the same tensor twice, several calls."""
    x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(5))
    found = []
    for table in ({"policy": "none"}, {}, {"policy": "selective"}):
        torch.manual_seed(6)
        model = Caller()
        start(model, blocks="Wide", **table)
        found.append(grads(model, x))
        assert model.log == ["a"] * (3 if table.get("policy") == "none" else 6)
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_keyword_tensors_are_checked_for_writes() -> None:
    """What is written into after a block has run is an error in backward, as in plain PyTorch, not a wrong gradient."""
    model = Caller()
    start(model, blocks="Wide")
    pair = (torch.ones(1, 2, WIDTH), (torch.ones(1, 2, WIDTH),))
    x = torch.randn(1, 2, WIDTH, requires_grad=True)
    loss = model.blocks[0](x, x, scale=model.scale, pair=pair, log=[], flag="")["x"].sum()
    pair[0].add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.cumulative = nn.BatchNorm1d(4, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.cumulative(self.norm(self.conv(x)).relu())


@pytest.mark.parametrize("table", [{}, {"policy": "selective", "save": ["conv"]}], ids=str)
def test_running_statistics_count_a_batch_once(table: dict[str, Any]) -> None:
    """Batch norms within recomputed blocks have the running statistics of the plain model."""
    states = []
    x = torch.randn(6, 4, 9, generator=torch.Generator().manual_seed(5))
    for settings in ({"policy": "none"}, table):
        torch.manual_seed(6)
        model = nn.Sequential(*(Normed() for _ in range(3)))
        start(model, **settings)
        found = grads(model, x) + grads(model, x)
        states.append(list(model.state_dict().values()) + found)
        assert model[0].norm.momentum == 0.1
    assert same(*states)


@compiles
@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_blocks_that_are_compiled(how: str) -> None:
    """Blocks that the user has compiled are recomputed like others."""
    torch.compiler.reset()
    model = make().eval()
    expected = grads(model)
    for number, block in enumerate(model.blocks):
        if how == "in place":
            block.compile(backend="aot_eager")
        else:
            model.blocks[number] = torch.compile(block, backend="aot_eager")
    before = kept(model)
    undo = start(model)
    assert kept(model) < before / 4
    for mine, theirs in zip(grads(model), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    for step in undo:
        step()
    assert kept(model) == before
    torch.compiler.reset()


@compiles
def test_a_whole_model_that_is_compiled() -> None:
    """A model that is compiled as a whole after the blocks were chosen is recomputed within its code."""
    torch.compiler.reset()
    model = make().eval()
    expected, before = grads(model), kept(model)
    start(model)
    code = torch.compile(model, backend="aot_eager")
    for mine, theirs in zip(grads(code), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert kept(code) < before / 4
    torch.compiler.reset()


def test_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    """The section switches it on, one line says what is recomputed, and closing the engine ends it."""
    model = make()
    with caplog.at_level(logging.INFO, logger="powertrain"):
        config = {"recompute": {"policy": "every", "every": 4}}
        with initialize(model, config, loss_fn=nn.functional.mse_loss) as engine:
            engine.train_step((batch(), torch.zeros(8, 5, 2)))
            engine.eval_step((batch(), torch.zeros(8, 5, 2)))
            assert [block.runs for block in model.blocks] == [3, 2, 2, 2, 3, 2]
    assert "recompute: every, 2 of 6 blocks (Block)" in caplog.text
    assert not any("forward" in vars(module) for module in model.modules())
    with initialize(model, {"recompute": {}}, loss_fn=nn.functional.mse_loss) as engine:
        engine.train_step((batch(), torch.zeros(8, 5, 2)))
    assert [block.runs for block in model.blocks] == [5, 4, 4, 4, 5, 4]
