"""One parameter's value, gradient and optimizer state, wherever they rest."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import powertrain
from powertrain import full, state, stream
from powertrain.access import adopt
from powertrain.errors import EngineError
from powertrain.parameter_state import StateView
from powertrain.replicated import ReplicatedOptimizer
from powertrain.roles.communicator import WrappedCommunicator
from powertrain.testing.loopback import LoopbackWorld
from powertrain.testing.scattered import CUTS, OddNet, Scattered, gradient_of, moment_of, on_scattered_ranks, same
from powertrain.testing.surroundings import make_context

cuts = pytest.mark.parametrize(("ranks", "cut"), CUTS, ids=[f"{n}-{cut}" for n, cut in CUTS])
TRUE = dict(OddNet().named_parameters())


@cuts
def test_state_shows_the_whole_on_every_rank(ranks, cut):
    """Value, gradient and moments are put together bit by bit, also on ranks that hold nothing of them."""

    def body(model, wrapper, communicator):
        for param, name in wrapper.names.items():
            found = state(param)
            assert found.name == found.value.name == name
            assert same(found.value.full(), TRUE[name])
            if name in ("frozen", "scalar"):
                assert found.grad is None
                continue
            assert same(found.grad.full(), gradient_of(TRUE[name]))
            assert found.optimizer["exp_avg"].full().dtype == torch.float64
            assert same(found.optimizer["exp_avg"].full(), moment_of(TRUE[name]))
            assert same(found.optimizer["step"].full(), torch.tensor(4.0))
            assert found.value.full().data_ptr() != found.value.full().data_ptr() or not param.numel()
        return len(state(model.odd).optimizer)

    counts = on_scattered_ranks(ranks, body, **cut)
    assert set(counts) <= {0, 2}


def test_state_shows_this_ranks_slice():
    """``local`` is the slice itself from ``start`` on; the slices of all ranks are the whole."""

    def body(model, wrapper, communicator):
        view = state(model.odd).value
        assert (view.shape, view.dtype) == ((7, 5, 3), torch.float32)
        assert same(view.local, TRUE["odd"].reshape(-1)[view.start : view.start + view.local.numel()])
        view.local.fill_(communicator.rank)
        view.publish()
        return view.start, view.local.numel(), view.full()

    (start, count, first), (_, rest, second) = on_scattered_ranks(2, body)
    assert count + rest == 105
    assert same(first, second)
    assert int((first == 0).sum()) == count
    assert bool((first.reshape(-1)[start : start + count] == 0).all())


@cuts
def test_write_keeps_each_ranks_slice(ranks, cut):
    """A whole tensor written on every rank is what the slices hold, and the model follows."""

    def body(model, wrapper, communicator):
        odd = state(model.odd)
        with full(model.odd):
            odd.value.write(torch.full((7, 5, 3), 3, dtype=torch.int64))
            assert wrapper.published == 1
            assert same(model.odd, torch.full((7, 5, 3), 3.0))
        odd.optimizer["exp_avg"].write(torch.arange(105.0).view(7, 5, 3), publish=False)
        odd.optimizer["step"].write(torch.tensor(9.0), publish=False)
        assert wrapper.published == 1
        odd.grad.write(torch.ones(7, 5, 3))
        assert wrapper.published == 2
        assert same(odd.value.full(), torch.full((7, 5, 3), 3.0))
        assert same(odd.optimizer["exp_avg"].full(), torch.arange(105.0).double().view(7, 5, 3))
        assert float(odd.optimizer["step"].full()) == 9
        assert bool((odd.grad.full() == 1).all())
        with pytest.raises(EngineError, match="another shape"):
            odd.value.write(torch.ones(105))

    on_scattered_ranks(ranks, body, **cut)


def test_places_are_exchanged_once():
    """A parameter's ``full`` tells the ranks once who holds what; after that it is one collective."""

    class Counting(WrappedCommunicator):
        operations = ()

        def issue(self, collective):
            self.operations += (collective.operation,)
            return self.inner.issue(collective)

    def run(communicator):
        counting, model = Counting(communicator), OddNet()
        wrapper = Scattered(model, counting)  # marks keep it by a weak reference
        odd, scalar = state(model.odd), state(model.scalar)
        assert counting.operations == ()
        odd.value.full()
        assert counting.operations == ("all_gather", "all_gather", "all_reduce")
        odd.grad.full()
        odd.value.full()
        assert counting.operations[3:] == ("all_reduce", "all_reduce")
        scalar.value.full()
        assert counting.operations[-1] == "broadcast"
        assert wrapper.published == 0

    LoopbackWorld(2).run(run)


def test_unknown_keys_are_named():
    """A key that the optimizer does not have is a KeyError that says which there are, on every rank."""

    def body(model, wrapper, communicator):
        with pytest.raises(KeyError, match=r"did you mean 'exp_avg'\?; there are: exp_avg, step"):
            state(model.odd).optimizer["exp_av"]
        assert "exp_av" not in state(model.odd).optimizer

    on_scattered_ranks(2, body)

    def with_nothing(model, wrapper, communicator):
        with pytest.raises(KeyError, match="no rank has optimizer/exp of odd"):
            StateView(state(model.odd)._source, "optimizer/exp", model.odd).full()

    on_scattered_ranks(2, with_nothing, nobody=1)


def test_a_layout_that_changed_is_an_error():
    """A slice that rests elsewhere than the ranks were told is an error, not another tensor."""

    def body(model, wrapper, communicator):
        view = state(model.odd).value
        view.full()
        start, cut = wrapper.kept[model.odd]
        wrapper.kept[model.odd] = (start, {**cut, "value": cut["value"][:-1]})
        with pytest.raises(EngineError, match="odd rests elsewhere"):
            view.full()

    on_scattered_ranks(2, body)


def test_plain_modules_are_whole_anyway():
    """A module that no engine holds needs nothing: its blocks, states and streams show what is there."""
    model = OddNet()
    with full(model, write=True), torch.no_grad():
        model.scalar.fill_(4)
    assert model.scalar.item() == 4
    with pytest.raises(ZeroDivisionError), full(model.parameters()):
        raise ZeroDivisionError
    model.odd.nan_to_num().sum().backward()
    odd = state(model.odd)
    assert (odd.name, odd.value.shape, odd.value.dtype, odd.value.start) == ("", (7, 5, 3), torch.float32, 0)
    assert same(odd.value.full(), TRUE["odd"])
    assert odd.grad is not None
    assert float(odd.grad.local[3]) == 1
    assert same(odd.grad.full(), model.odd.grad)
    assert list(odd.optimizer) == []
    with pytest.raises(KeyError, match="there are: none"):
        odd.optimizer["exp_avg"]
    odd.value.local[0] = 8
    odd.value.publish()
    assert model.odd[0, 0, 0].item() == 8
    odd.value.write(torch.ones(7, 5, 3))
    assert bool((model.odd == 1).all())
    assert state(model.row.weight).grad is None
    assert dict(stream(model)).keys() == {*TRUE, "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def test_channels_last_models_are_written():
    """What is written into slices of a model in another memory format reaches model and moments."""
    model = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    config = {"optimizer": {"name": "adamw", "lr": 0.1}}
    with powertrain.initialize(model, config, loss_fn=lambda y, _: y.square().mean()) as engine:
        engine.train_step((torch.randn(2, 2, 5, 5), torch.zeros(2)))
        assert not model.weight.is_contiguous()
        weight = state(model.weight)
        assert same(weight.value.full(), model.weight)
        assert same(weight.grad.full(), model.weight.grad)
        new = torch.randn(3, 2, 3, 3)
        weight.value.write(new)
        assert same(model.weight, new)
        weight.value.local[4] = 9
        weight.value.publish()
        assert float(model.weight.detach().reshape(-1)[4]) == 9
        moment = weight.optimizer["exp_avg"]
        moment.local.fill_(2)
        engine.train_step((torch.zeros(2, 2, 5, 5), torch.zeros(2)))
        assert bool((moment.full() == 2 * 0.9).all())


def test_gradients_are_shown_between_steps():
    """A gradient is there once the step is done, not while it is gathered, nor after it was dropped."""
    model = nn.Linear(2, 1)
    config = {"batch": {"accumulation": 2, "micro": 1}}
    with powertrain.initialize(model, config, loss_fn=lambda y, _: y.sum()) as engine:
        batch = (torch.ones(1, 2), torch.zeros(1))
        assert state(model.weight).grad is None
        engine(batch).backward()
        engine.step()
        assert state(model.weight).grad is None
        engine(batch).backward()
        engine.step()
        assert state(model.weight).grad.full().tolist() == [[1, 1]]
        engine(batch).backward()
        engine.optimizer_wrapper.discard()
        assert state(model.weight).grad is None


def test_replicated_ranks_agree_without_a_collective():
    """Where every rank holds everything, ``full`` copies; a rank of another thread is not needed for it."""

    def run(communicator):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            model.weight.fill_(1)
        wrapper = ReplicatedOptimizer(model, torch.optim.SGD(model.parameters()), make_context(communicator))
        adopt(model, wrapper, communicator)
        view = state(model.weight).value
        view.full()
        assert threading.current_thread() is not threading.main_thread()
        if communicator.rank == 0:
            assert bool((view.full() == 1).all())
        with full(model, write=True), torch.no_grad():
            model.weight.fill_(communicator.rank + 5)
        assert bool((model.weight == 5).all())
        wrapper.close()

    LoopbackWorld(2).run(run)
