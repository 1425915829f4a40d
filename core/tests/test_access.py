"""Who holds a parameter, and all of it for a block."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

import powertrain
from powertrain import full, state
from powertrain.access import home_of, release
from powertrain.errors import CommunicationError, EngineError, PeerFailed
from powertrain.roles.communicator import WrappedCommunicator
from powertrain.testing.loopback import LoopbackWorld
from powertrain.testing.scattered import CUTS, OddNet, Scattered, on_scattered_ranks, same

cuts = pytest.mark.parametrize(("ranks", "cut"), CUTS, ids=[f"{n}-{cut}" for n, cut in CUTS])
TRUE = dict(OddNet().named_parameters())


def is_whole(model):
    return all(same(param, TRUE[name]) for name, param in model.named_parameters())


def is_away(model):
    return all(bool(param.isnan().all()) for param in model.parameters())


@cuts
def test_full_makes_a_module_whole(ranks, cut):
    """Inside the block each parameter has its values, bit by bit, and its shape; outside it rests in pieces again."""

    def body(model, wrapper, communicator):
        assert is_away(model)
        with full(model):
            assert is_whole(model)
        assert is_away(model)

    on_scattered_ranks(ranks, body, **cut)


def test_full_takes_parameters():
    """A parameter, an iterable of them (each once), a part of the model or an engine."""

    class Engine:
        def __init__(self, module):
            self.module = module

    def body(model, wrapper, communicator):
        with full(model.odd):
            assert same(model.odd, TRUE["odd"])
            assert bool(model.frozen.isnan().all())
        with full(param for param in [model.frozen, model.late.tied, model.row.weight]):
            assert same(model.row.weight, TRUE["row.weight"])
            assert bool(model.odd.isnan().all())
        with full(model.row):
            assert same(model.row.bias, TRUE["row.bias"])
        with full(Engine(model)):
            assert is_whole(model)
        with full([]):
            assert is_away(model)

    on_scattered_ranks(2, body)


def test_inner_blocks_are_free():
    """A block of what is whole already communicates nothing, and its end takes nothing away."""

    class Counting(WrappedCommunicator):
        issued = 0

        def issue(self, collective):
            self.issued += 1
            return self.inner.issue(collective)

    def run(communicator):
        counting, model = Counting(communicator), OddNet()
        kept = Scattered(model, counting)
        for write in (False, True):
            with full(model, write=write):
                before = counting.issued
                with full(model.row, write=write), full([model.odd]):
                    assert is_whole(model)
                assert is_whole(model)
                # A writing block in a writing one leaves it to the outer.
                assert counting.issued == before
        assert kept.published == 1
        assert is_away(model)

    LoopbackWorld(2).run(run)


def test_blocks_overlap():
    """Blocks may share parameters, and may end in any order: what somebody still uses stays whole."""

    def body(model, wrapper, communicator):
        first, second = full([model.odd, model.frozen]), full([model.frozen, model.scalar], write=True)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert same(model.frozen, TRUE["frozen"])
        assert same(model.scalar, TRUE["scalar"])
        with torch.no_grad():
            model.scalar.fill_(7)
            model.frozen.mul_(2)
        second.__exit__(None, None, None)
        assert is_away(model)
        assert same(state(model.scalar).value.full(), torch.tensor(7.0))
        assert same(state(model.frozen).value.full(), TRUE["frozen"] * 2)

    on_scattered_ranks(3, body)


@cuts
def test_full_keeps_what_the_first_rank_writes(ranks, cut):
    """With ``write=True`` the first data rank's values are everybody's, in every slice."""

    def body(model, wrapper, communicator):
        with full(model, write=True), torch.no_grad():
            model.odd.fill_(5 + communicator.rank)
            model.row.weight[1] = communicator.rank
            model.frozen[4] = 9
            model.scalar.neg_()
        assert is_away(model)
        with full(model):
            assert same(model.odd, torch.full((7, 5, 3), 5.0))
            expected = TRUE["row.weight"].detach().clone()
            expected[1] = 0
            assert same(model.row.weight, expected)
            assert model.frozen.tolist() == [0, 1, 2, 3, 9]
            assert model.scalar.item() == -2.5
            assert same(model.row.bias, TRUE["row.bias"])

    on_scattered_ranks(ranks, body, **cut)


def test_an_inner_block_may_write():
    """A writing block inside a reading one keeps its parameters' writes, and those only."""

    def body(model, wrapper, communicator):
        with full(model):
            with full(model.row, write=True), torch.no_grad():
                model.row.bias.fill_(1 + communicator.rank)
            assert model.row.bias.tolist() == [1, 1, 1]
        assert state(model.row.bias).value.full().tolist() == [1, 1, 1]
        assert same(state(model.odd).value.full(), TRUE["odd"])

    on_scattered_ranks(2, body)


@pytest.mark.parametrize("alone", [False, True])
def test_what_an_exception_cuts_short_is_kept(alone):
    """An exception in the block, on all ranks or on one, leaves what was written before it, on all ranks."""

    def body(model, wrapper, communicator):
        failed = False
        try:
            with full(model, write=True), torch.no_grad():
                model.odd.fill_(5 + communicator.rank)
                if communicator.rank == 0 or not alone:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            failed = True
        assert failed or (alone and communicator.rank)
        assert is_away(model)
        assert same(state(model.odd).value.full(), torch.full((7, 5, 3), 5.0))
        with full(model):
            assert same(model.row.weight, TRUE["row.weight"])

    on_scattered_ranks(2, body)


def test_nobody_waits_for_a_lost_rank():
    """When communication has failed, the block's end does not communicate."""

    def body(model, wrapper, communicator):
        with pytest.raises(PeerFailed), full(model.odd, write=True):
            raise PeerFailed("rank 1 is gone")
        assert wrapper.published == 0
        with pytest.raises(KeyboardInterrupt), full(model.odd, write=True):
            raise KeyboardInterrupt
        assert wrapper.published == 0
        assert is_away(model)

    assert issubclass(PeerFailed, CommunicationError)
    on_scattered_ranks(2, body)


def test_what_was_not_written_keeps_its_precision():
    """Where masters are finer than the model, a write changes the masters of the elements written, and no others."""
    model = nn.Linear(3, 2, bias=False)
    masters = model.weight.detach().clone()
    engine = powertrain.initialize(model, {"precision": {"compute": "bf16"}}, loss_fn=lambda y: y.sum())
    with engine:
        assert model.weight.dtype == torch.bfloat16
        with full(model, write=True), torch.no_grad():
            model.weight[0, 1] = -0.0
            model.weight[1, 2] = math.nan
        found = state(model.weight).value.full()
        assert found.dtype == torch.float32
        masters[0, 1] = -0.0
        assert same(found[0], masters[0])
        assert same(found[1, :2], masters[1, :2])
        assert bool(found[1, 2].isnan())
        with full(model, write=True), torch.no_grad():
            model.weight[0, 1] = 0.0
        masters[0, 1] = 0.0
        assert same(state(model.weight).value.full()[0], masters[0])


# --- who holds what ---


def test_two_engines_know_nothing_of_each_other():
    """Each parameter's own wrapper is asked, also in one block over both models."""

    def run(communicator):
        first, second = OddNet(), OddNet()
        wrappers = [Scattered(model, communicator) for model in (first, second)]
        with full(first, write=True), torch.no_grad():
            first.scalar.fill_(1)
        assert [wrapper.published for wrapper in wrappers] == [1, 0]
        with full(nn.ModuleList([first, second])):
            assert first.scalar.item() == 1
            assert is_whole(second)
        release(first, wrappers[1])  # not its own
        assert home_of(first.odd) is not None
        release(first, wrappers[0])
        assert home_of(first.odd) is None
        with full(second):
            assert is_whole(second)

    LoopbackWorld(2).run(run)


def test_a_closed_engine_leaves_plain_parameters():
    """After ``close`` the model is any model; views of before say so."""
    model = nn.Linear(2, 1)
    engine = powertrain.initialize(model, {}, loss_fn=lambda y: y.mean())
    view = state(model.weight).value
    assert view.name == "weight"
    engine.close()
    assert state(model.weight).name == ""
    assert vars(model.weight) == {}
    with pytest.raises(EngineError, match="is closed"):
        view.full()
    with powertrain.initialize(model, {}, loss_fn=lambda y: y.mean()) as second:
        assert home_of(model.weight).wrapper is second.optimizer_wrapper


def test_a_forgotten_engine_is_not_kept_alive():
    """The mark on a parameter keeps neither the engine nor its optimizer alive."""
    model = nn.Linear(2, 1)
    engine = powertrain.initialize(model, {}, loss_fn=lambda y: y.mean())
    wrapper = weakref.ref(engine.optimizer_wrapper)
    del engine
    gc.collect()
    assert wrapper() is None
    assert state(model.weight).name == ""


def test_copies_of_a_model_are_plain():
    """Copied, pickled and saved models, and their single parameters, belong to no engine."""
    model = nn.Linear(2, 1)
    with powertrain.initialize(model, {}, loss_fn=lambda y: y.mean()):
        file = io.BytesIO()
        torch.save({"param": model.weight}, file)
        file.seek(0)
        copies = [
            copy.deepcopy(model).weight,
            pickle.loads(pickle.dumps(model)).weight,
            copy.copy(model.weight),
            torch.load(file, weights_only=True)["param"],
        ]
        for param in copies:
            assert home_of(param) is None
            assert same(state(param).value.full(), model.weight)
