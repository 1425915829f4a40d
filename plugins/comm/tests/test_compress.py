"""Compressed reductions: what arrives, what is owed, what is left alone, and what a checkpoint carries on."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from powertrain.errors import LaunchError, OptimizerError, ShardingError
from powertrain.kernels.blockwise import Blockwise
from powertrain.mesh import Mesh
from powertrain.precision import LossScale
from powertrain.roles.communicator import Collective, Communicator, Handle, WrappedCommunicator
from powertrain.roles.optimizer import FlatOptimizer
from powertrain.testing.loopback import LoopbackWorld
from powertrain.testing.null import NullHost
from powertrain_comm.compress import choice, codecs
from powertrain_comm.compress.communicator import CompressedCommunicator
from powertrain_comm.compress.feedback import Feedback
from powertrain_comm.config import Compress

CODECS = {
    "onebit": codecs.OneBit(32),
    "topk": codecs.TopK(0.1),
    "int8": Blockwise(8, 32),
    "int4": Blockwise(4, 32),
}
METHODS = list(CODECS)


class Noted(WrappedCommunicator):
    """Notes operations and the bytes that go in."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.seen: list[tuple[str, int]] = []

    def issue(self, collective: Collective) -> Handle:
        given = collective.input
        self.seen.append((collective.operation, 0 if given is None else given.nbytes))
        return super().issue(collective)


def compressed(communicator: Communicator, **table: Any) -> CompressedCommunicator:
    settings = {"block": 32, "least": 1, **table}
    return CompressedCommunicator(Noted(communicator), Compress(**settings), NullHost())


def seen(communicator: CompressedCommunicator) -> list[tuple[str, int]]:
    assert isinstance(communicator.inner, Noted)
    return communicator.inner.seen


def gradient(seed: int, numel: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator)


# --- codecs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_codecs_keep_their_promises(name: str) -> None:
    """The bytes are as many as announced and equal for equal elements; a decoded row encodes to itself."""
    codec = CODECS[name]
    rows = torch.stack([gradient(1, 640), gradient(2, 640) * 1e-20])
    data = codec.encode(rows)
    assert data.shape == (2, codec.row_bytes(640)) and data.dtype == torch.uint8
    assert torch.equal(data, codec.encode(rows))
    out = torch.empty_like(rows)
    codec.decode(data, out)
    again = torch.empty_like(rows)
    codec.decode(codec.encode(out), again)
    torch.testing.assert_close(again, out, rtol=1e-6, atol=0)
    assert (out - rows).norm() < rows.norm()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_arrives_as_none(name: str, bad: float) -> None:
    """One bad element makes the row's sum none, and is owed to nobody afterwards."""
    rows = gradient(1, 640).view(1, -1)
    rows[0, 77] = bad
    out = torch.empty_like(rows)
    CODECS[name].decode(CODECS[name].encode(rows), out)
    assert not out.sum().isfinite()


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    """By the block, zero as positive."""
    rows = torch.tensor([[3.0, -1.0, 0.0, 2.0, -2.0, 1.0, 1.0, -6.0] + [-4.0] * 8])
    out = torch.empty_like(rows)
    codec = codecs.OneBit(8)
    codec.decode(codec.encode(rows), out)
    assert out.tolist() == [[2.0, -2.0, 2.0, 2.0, -2.0, 2.0, 2.0, -2.0] + [-4.0] * 8]


def test_topk_sends_the_largest_exactly() -> None:
    """And nothing else."""
    rows = torch.tensor([[0.1, -9.0, 3.0, 0.2, 0.0, 5.0]])
    out = torch.empty_like(rows)
    codec = codecs.TopK(0.34)
    codec.decode(codec.encode(rows), out)
    assert out.tolist() == [[0.0, -9.0, 0.0, 0.0, 0.0, 5.0]]


# --- reductions -----------------------------------------------------------------------------------

TOLERANCE = {"int8": 0.03, "int4": 0.5}
"""Of the largest element: half a step of each of the two hops, with room for an average."""


def reduce_both(communicator: Communicator, method: str, how: str, numel: int) -> dict[str, Any]:
    comm = compressed(communicator, method=method, error_feedback=False)
    n = comm.world_size
    given = gradient(comm.rank, numel + 3)
    given[numel:] = torch.arange(3) + comm.rank
    reduced = given.clone()
    comm.all_reduce(reduced, reduction=how, lossy=numel, label="g").wait()  # type: ignore[arg-type]
    whole = torch.cat([gradient(100 * comm.rank + k, numel) for k in range(n)])
    before = whole.clone()
    piece = torch.empty(numel)
    comm.reduce_scatter(piece, whole, reduction=how, lossy=numel, label="s").wait()  # type: ignore[arg-type]
    assert torch.equal(whole, before)
    return {"reduced": reduced, "piece": piece}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("method", TOLERANCE)
@pytest.mark.parametrize("numel", [1, 37, 1024])
def test_reductions_are_right_within_the_format(world: int, how: str, method: str, numel: int) -> None:
    """Whatever the sizes; all ranks get the same bits, and what is not lossy is exact."""
    results = LoopbackWorld(world).run(reduce_both, method, how, numel)
    divisor = world if how == "mean" else 1
    expected = sum(gradient(rank, numel + 3)[:numel] for rank in range(world)) / divisor
    room = TOLERANCE[method] * float(expected.abs().max())
    most = max(float(gradient(rank, numel + 3).abs().max()) for rank in range(world)) * world / divisor
    room += TOLERANCE[method] * most
    for rank, result in enumerate(results):
        assert torch.equal(result["reduced"], results[0]["reduced"])
        assert (result["reduced"][:numel] - expected).abs().max() <= room
        exact = sum(torch.arange(3.0) + other for other in range(world)) / divisor
        assert torch.equal(result["reduced"][numel:], exact)
        pieces = [gradient(100 * other + rank, numel) for other in range(world)]
        most = max(float(piece.abs().max()) for piece in pieces) * world / divisor
        assert (result["piece"] - sum(pieces) / divisor).abs().max() <= TOLERANCE[method] * most


def over_and_over(communicator: Communicator, method: str, steps: int) -> list[torch.Tensor]:
    """Reduce the same gradients again and again; return the sums of what arrived."""
    comm = compressed(communicator, method=method, ratio=0.1)
    n = comm.world_size
    total, pieces = torch.zeros(512), torch.zeros(256)
    for _ in range(steps):
        given = gradient(comm.rank, 512)
        comm.all_reduce(given, reduction="mean", lossy=512, label="g").wait()
        total += given
        piece = torch.empty(256)
        comm.reduce_scatter(piece, gradient(9 + comm.rank, 256 * n), reduction="mean", lossy=256, label="s").wait()
        pieces += piece
    return [total / steps, pieces / steps]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_lost_only_late(method: str) -> None:
    """With error feedback the average of what arrives over T steps nears the exact mean as 1 / T."""
    exact = (gradient(0, 512) + gradient(1, 512)) / 2
    scattered = (gradient(9, 512) + gradient(10, 512)) / 2
    errors = []
    for steps in (20, 160):
        results = LoopbackWorld(2).run(over_and_over, method, steps)
        own = [float((total - exact).norm()) for total, _ in results]
        parts = [float((piece - scattered[256 * k : 256 * k + 256]).norm()) for k, (_, piece) in enumerate(results)]
        errors.append(max(own + parts))
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.15 * float(exact.norm())


def with_overflow(communicator: Communicator, method: str) -> list[bool]:
    comm = compressed(communicator, method=method)
    finite = []
    for step in range(3):
        given = gradient(comm.rank, 256)
        if step == 1 and comm.rank == 0:
            given[5] = float("inf")
        comm.all_reduce(given, reduction="mean", lossy=256, label="g").wait()
        finite.append(bool(given.sum().isfinite()))
    return finite


@pytest.mark.parametrize("method", METHODS)
def test_an_overflow_is_seen_by_all_and_forgotten(method: str) -> None:
    """The step after it is finite again on every rank."""
    assert LoopbackWorld(2).run(with_overflow, method) == [[True, False, True]] * 2


def out_of_order(communicator: Communicator) -> list[torch.Tensor]:
    """Issue alike on all ranks, wait differently."""
    comm = compressed(communicator, method="int8")
    chance = random.Random(comm.rank)
    found = []
    for _ in range(10):
        tensors = [gradient(comm.rank + 10 * k, 300) for k in range(7)]
        handles: list[Handle] = []
        early = chance.sample(range(7), 3)
        for k, tensor in enumerate(tensors):
            handles.append(comm.all_reduce(tensor, reduction="mean", lossy=297, label=f"g {k}"))
            if k in early:
                handles[chance.randrange(len(handles))].wait()
        for k in chance.sample(range(7), 7):
            handles[k].wait()
            handles[k].wait()
            assert handles[k].done()
        found += tensors
    return found


def test_ranks_may_wait_in_any_order() -> None:
    """Second hops go in the order of the reductions, whoever waits for which first."""
    first, *others = LoopbackWorld(3).run(out_of_order)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def left_alone(communicator: Communicator) -> list[tuple[str, int]]:
    comm = compressed(communicator, method="int8", least=64, dimension="data")
    comm.all_reduce(torch.ones(64)).wait()  # a norm: not lossy
    comm.all_reduce(torch.ones(63), lossy=63).wait()  # small
    comm.all_reduce(torch.ones(64, dtype=torch.int64), lossy=64).wait()
    comm.all_reduce(torch.ones(64), reduction="max", lossy=64).wait()
    comm.all_reduce(torch.ones(64), "world", lossy=64).wait()
    comm.reduce_scatter(torch.ones(64), torch.ones(128), lossy=63).wait()
    comm.all_gather(torch.ones(128), torch.ones(64)).wait()
    return seen(comm)


def test_everything_else_travels_as_it_is() -> None:
    """What is not lossy, small, of whole numbers, along another dimension, and other operations."""
    expected = [("all_reduce", 256), ("all_reduce", 252), ("all_reduce", 512), ("all_reduce", 256),
                ("all_reduce", 256), ("reduce_scatter", 512), ("all_gather", 256)]  # fmt: skip
    assert LoopbackWorld(2).run(left_alone) == [expected] * 2


def counted(communicator: Communicator, method: str) -> list[tuple[str, int]]:
    comm = compressed(communicator, method=method, block=256, ratio=0.01)
    comm.all_reduce(torch.ones(1 << 16), lossy=1 << 16).wait()
    return seen(comm)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_as_few_as_promised(method: str) -> None:
    """Of 65536 elements in fp32: one bit 1/32, int8 1/4, int4 1/8, topk 1/50, scales beside them."""
    ((first, to_all), (second, gathered)) = LoopbackWorld(2).run(counted, method)[0]
    part = {"onebit": 1 / 32, "int8": 1 / 4, "int4": 1 / 8, "topk": 1 / 50}[method]
    scales = 0 if method == "topk" else (1 << 16) // 256 * 4
    assert (first, second) == ("all_to_all", "all_gather")
    assert to_all == pytest.approx((1 << 18) * part + scales, rel=1e-3)
    assert gathered == to_all // 2


# --- state ----------------------------------------------------------------------------------------


def stop_and_go(communicator: Communicator, stop: bool) -> torch.Tensor:
    comm = compressed(communicator, method="onebit")
    for step in range(6):
        if stop and step == 3:
            state = {name: value.clone() for name, value in comm.state().items()}
            comm = compressed(communicator, method="onebit")
            comm.load_state(state)
        given = gradient(comm.rank + 10 * step, 300)
        comm.all_reduce(given, reduction="mean", lossy=300, label="g").wait()
    return given


def test_state_carries_on_bit_by_bit() -> None:
    """A wrapper that continues from another's state owes what that one did."""
    for went, stopped in zip(
        LoopbackWorld(2).run(stop_and_go, False), LoopbackWorld(2).run(stop_and_go, True), strict=True
    ):
        assert torch.equal(went, stopped)


def owed(communicator: Communicator) -> dict[str, torch.Tensor]:
    comm = compressed(communicator, method="onebit")
    given = gradient(comm.rank, 300)
    comm.all_reduce(given, reduction="mean", lossy=300, label="g").wait()
    return comm.state()


def go_on(communicator: Communicator, state: dict[str, torch.Tensor]) -> torch.Tensor:
    comm = compressed(communicator, method="onebit")
    comm.load_state(state)
    given = torch.zeros(300)
    comm.all_reduce(given, reduction="mean", lossy=300, label="g").wait()
    rest = next(value for name, value in comm.state().items() if "/whole/" in name)
    served = comm.state()["compress/served/3/data/g"].view(-1)
    comm.all_reduce(mean := rest.view(-1)[:300].clone(), reduction="mean").wait()
    comm.all_gather(everyone := torch.empty(3 * served.numel()), served).wait()
    return given + mean + everyone[:300]


def test_other_numbers_of_ranks_owe_the_mean() -> None:
    """What two ranks owe together three ranks owe too: what arrives and what is still owed add up to it."""
    states = LoopbackWorld(2).run(owed)
    (name,) = [name for name in states[0] if "/whole/" in name]
    mean = torch.stack([state[name] for state in states]).mean(0)
    for found in LoopbackWorld(3).run(go_on, {name: mean}):
        torch.testing.assert_close(found, mean.view(-1)[:300], rtol=0, atol=1e-6)


def test_only_what_fits_is_wanted() -> None:
    """Of an earlier run's state: all data ranks' own order of elements, and pieces for as many ranks as there are."""

    def wanted(communicator: Communicator) -> list[bool]:
        names = ["compress/whole/data/g", "compress/sent/2/data/g", "compress/sent/4/data/g", "compress/sent/2/none/g"]
        comm = compressed(communicator, method="onebit")
        return [comm.wants(name) for name in [*names, "compress/served/2/data/g", "other/whole/data/g"]]

    assert LoopbackWorld(2).run(wanted) == [[True, True, False, False, True, False]] * 2


def test_what_is_not_asked_for_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    """What was loaded under names that a whole step did not use is not kept, nor saved again; what was used is."""
    caplog.set_level("INFO")
    memory = Feedback(True)
    memory.load_state({"used": torch.ones(1, 32), "left": torch.ones(1, 32)})
    memory.begin(LossScale(1.0, dynamic=False, checked=False), asked=True)  # a run that goes on within one process
    assert set(memory.state()) == {"used", "left"}
    memory.encode("used", torch.ones(1, 32), CODECS["onebit"])
    memory.begin(LossScale(1.0, dynamic=False, checked=False), asked=True)
    assert set(memory.state()) == {"used"}
    assert "lets go what it owed to left" in caplog.text


def test_debts_follow_the_loss_scale() -> None:
    """In units of the scale within a step, of the gradients in a checkpoint; a skipped step leaves none."""
    memory, scale = Feedback(True), LossScale(1024.0, dynamic=True, checked=True)

    memory.begin(scale, asked=False)
    memory.encode("g", gradient(0, 64).view(1, 64), CODECS["topk"])
    saved = {name: error.clone() for name, error in memory.state().items()}
    scale.value = 256.0
    memory.begin(scale, asked=True)
    torch.testing.assert_close(memory.state()["g"], saved["g"], rtol=0, atol=0)  # powers of two are exact
    other = Feedback(True)
    other.load_state({name: error.clone() for name, error in saved.items()})
    other.begin(LossScale(1.0, dynamic=False, checked=False), asked=False)
    nothing = torch.zeros(1, 64)
    sums = [memory.encode("g", nothing.clone(), CODECS["topk"]), other.encode("g", nothing.clone(), CODECS["topk"])]
    found = [torch.zeros(1, 64), torch.zeros(1, 64)]
    for row, into in zip(sums, found, strict=True):
        CODECS["topk"].decode(row, into)
    assert found[1].any()
    torch.testing.assert_close(found[0], found[1] * 256.0, rtol=0, atol=0)
    scale.update(applied=False)
    assert not memory.state()  # already in the checkpoint of the step that was skipped


def test_ranks_agree_on_what_their_optimizers_wish() -> None:
    """All compress only where every rank that has state would; a rank without any goes along."""

    class Wishing(FlatOptimizer):
        wish: str | None = None

        def __init__(self, wish: str | None, state: bool) -> None:
            super().__init__([torch.nn.Parameter(torch.zeros(1))], {})
            self.wish = wish
            if state:
                self.state[self.param_groups[0]["params"][0]]["step"] = 1

        @property
        def reducer(self) -> str | None:
            return self.wish

        def update(self, group: dict[str, Any], params: Any) -> None: ...

    def agreed(communicator: Communicator, cases: list[tuple[str | None, bool]]) -> str | None:
        return choice.agreed(Wishing(*cases[communicator.rank]), communicator)

    def outcome(*cases: tuple[str | None, bool]) -> str | None:
        found = LoopbackWorld(len(cases)).run(agreed, list(cases))
        assert len(set(found)) == 1
        return found[0]

    assert outcome(("onebit", True), ("onebit", True)) == "onebit"
    assert outcome(("onebit", True), (None, False)) == "onebit"
    assert outcome(("onebit", True), (None, True)) is None
    assert outcome((None, False), (None, False)) is None


def test_short_pieces_of_long_messages_are_compressed() -> None:
    """``least`` is a message's length, on however many ranks its pieces lie."""

    def sent(communicator: Communicator) -> int:
        comm = compressed(communicator, method="int8", least=100)
        for numel in (128, 64):
            comm.reduce_scatter(torch.empty(numel // 2), torch.ones(numel), lossy=numel // 2, label="g").wait()
        return comm.compressed

    assert LoopbackWorld(2).run(sent) == [1, 1]


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"ratio": 0.0}, "ratio must be above 0"),
        ({"ratio": 1.5}, "ratio must be above 0"),
        ({"block": 12}, "multiple of 8"),
        ({"after": -1}, "after must not be negative"),
        ({"least": 0}, "least must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(table: dict[str, Any], told: str) -> None:
    """With the key's name."""
    with pytest.raises(ValueError, match=told):
        Compress(**table)


def test_an_optimizer_that_never_asks_is_refused() -> None:
    """``method = "optimizer"`` needs one that says when."""
    with pytest.raises(OptimizerError, match="never asks for compressed gradients"):
        choice.check(Compress(method="optimizer"), training(torch.optim.SGD))


def training(kind: Any, stated: bool = False) -> Any:
    """Return what ``check`` sees of an engine: an optimizer, two ranks, and whether somebody set the method."""
    optimizer = kind([torch.ones(1, requires_grad=True)], lr=0.1)
    sizes = Mesh.build(2, 0)
    communicator = SimpleNamespace(rank=0, size=lambda dimension: len(sizes.peers(dimension)))
    context = SimpleNamespace(communicator=communicator, config=SimpleNamespace(is_stated=lambda path: stated))
    return SimpleNamespace(optimizer_wrapper=SimpleNamespace(optimizer=optimizer), context=context)


@pytest.mark.parametrize("dimension", ["dta", "data.across4"])
def test_a_dimension_that_there_is_not_is_refused(dimension: str) -> None:
    """The error names the key, whatever is wrong with the name."""
    with pytest.raises((LaunchError, ShardingError)) as caught:
        choice.check(Compress(method="int8", dimension=dimension), training(torch.optim.SGD))
    assert caught.value.where == "comm.compress.dimension"
    assert "name a dimension of this run" in str(caught.value)


def test_a_method_that_is_noise_to_the_optimizer_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """One bit and topk with Adam train worse: a warning says so, and what to use."""
    choice.check(Compress(method="topk"), training(torch.optim.SGD))
    choice.check(Compress(method="int8"), training(torch.optim.AdamW))
    assert not caplog.records
    choice.check(Compress(method="topk"), training(torch.optim.AdamW))
    (record,) = caplog.records
    assert "topk" in record.getMessage() and "int8" in record.getMessage()


def test_keys_without_a_method_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """They compress nothing, which is no secret unless somebody switched it off; nothing is told of no table."""
    choice.check(Compress(), training(torch.optim.SGD))
    choice.check(Compress(least=1), training(torch.optim.SGD, stated=True))
    assert not caplog.records
    choice.check(Compress(least=1), training(torch.optim.SGD))
    assert "has no method" in caplog.text
