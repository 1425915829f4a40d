"""All tensors of a model, whole, one after the other."""

from __future__ import annotations

import weakref

import pytest
import torch

import powertrain
from powertrain import state, stream
from powertrain.testing.scattered import CUTS, OddNet, on_scattered_ranks, same

cuts = pytest.mark.parametrize(("ranks", "cut"), CUTS, ids=[f"{n}-{cut}" for n, cut in CUTS])
TRUE = dict(OddNet().named_parameters())


@cuts
def test_stream_yields_everything_once(ranks, cut):
    """Every parameter and persistent buffer, tied ones once, the same names, order and bits on every rank."""

    def body(model, wrapper, communicator):
        with torch.no_grad():
            model.norm.running_mean.fill_(communicator.rank + 1.0)
        found = list(stream(model))
        assert bool(model.odd.isnan().all())
        return found

    runs = on_scattered_ranks(ranks, body, **cut)
    names = [*TRUE, "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    for found in runs:
        assert [name for name, _ in found] == names
        for name, tensor in found:
            if name in TRUE:
                assert same(tensor, TRUE[name]), name
        assert dict(found)["norm.running_mean"].tolist() == [1, 1]


def test_stream_converts():
    """With a dtype, floating-point tensors come in it, rounded once; others are left alone."""

    def body(model, wrapper, communicator):
        for name, tensor in stream(model, dtype=torch.bfloat16):
            if name == "norm.num_batches_tracked":
                assert tensor.dtype == torch.int64
            elif name in TRUE:
                assert same(tensor, TRUE[name].to(torch.bfloat16)), name
            else:
                assert tensor.dtype == torch.bfloat16

    on_scattered_ranks(3, body)


def test_stream_holds_one_tensor_at_a_time():
    """What the consumer drops is gone before the next tensor is made, and copies are nobody else's memory."""

    def body(model, wrapper, communicator):
        previous = None
        items = stream(model)
        count = 0
        while True:
            assert previous is None or previous() is None
            item = next(items, None)
            if item is None:
                break
            previous = weakref.ref(item[1])
            item[1].zero_()
            del item
            count += 1
        assert count == len(TRUE) + 3
        assert same(state(model.odd).value.full(), TRUE["odd"])

    on_scattered_ranks(2, body)
    replicated = OddNet()
    with powertrain.initialize(replicated, {}, loss_fn=lambda y: y) as engine:
        for _, tensor in stream(engine):
            tensor.fill_(0)
        assert same(replicated.odd, TRUE["odd"])


def test_stream_may_stop_after_the_same_item():
    """Ranks that all stop after the same item go on with other collectives at once."""

    def body(model, wrapper, communicator):
        for name, _ in stream(model):
            if name == "row.weight":
                break
        return communicator.gather_json(communicator.rank)

    assert on_scattered_ranks(2, body) == [[0, 1], [0, 1]]
