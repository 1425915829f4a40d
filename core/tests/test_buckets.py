"""Gradient buckets: a fixed order on all ranks, whatever each of them used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from powertrain.buckets import GradientBuckets
from powertrain.roles.communicator import Collective, Handle, WrappedCommunicator
from powertrain.testing.loopback import LoopbackWorld


class Noted(WrappedCommunicator):
    """Notes what is issued, in order."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.labels: list[str] = []

    def issue(self, collective: Collective) -> Handle:
        self.labels.append(collective.label)
        return super().issue(collective)


class Rig:
    """One rank's parameters a, b, c (in forward order) and their buckets."""

    def __init__(self, communicator: Any, bucket_bytes: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.params = {name: nn.Parameter(torch.ones(2)) for name in "abc"}
        self.noted = Noted(communicator)
        named = list(reversed(self.params.items()))
        self.buckets = GradientBuckets(named, self.noted, dtype, bucket_bytes)
        self.rank = communicator.rank

    def backward(self, **factors: float) -> None:
        """Give each named parameter a gradient of its factor."""
        sum((self.params[name] * factor).sum() for name, factor in factors.items()).backward()  # type: ignore[union-attr]

    def finish(self) -> dict[str, list[float]]:
        means = self.buckets.finish()
        return {name: means[param].tolist() for name, param in self.params.items() if param in means}


def on(ranks: int, body: Callable[[Rig], Any], **options: Any) -> list[Any]:
    return LoopbackWorld(ranks).run(lambda communicator: body(Rig(communicator, **options)))


@pytest.mark.parametrize("bucket_bytes", [1, 16, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gradients_are_averaged(ranks: int, bucket_bytes: int) -> None:
    """Each parameter's gradient is the mean over ranks, however parameters are cut into buckets."""

    def body(rig: Rig) -> Any:
        rig.buckets.begin(first=True, last=True)
        rig.backward(a=rig.rank, b=2.0 * rig.rank, c=1.0)
        return rig.finish()

    mean = sum(range(ranks)) / ranks
    expected = {"a": [mean] * 2, "b": [2 * mean] * 2, "c": [1.0] * 2}
    for found in on(ranks, body, bucket_bytes=bucket_bytes):
        assert {name: pytest.approx(values) for name, values in found.items()} == expected


def test_all_ranks_send_in_one_order() -> None:
    """Ranks whose gradients come in other orders, or not at all, issue the same collectives."""

    def body(rig: Rig) -> list[str]:
        rig.buckets.begin(first=True, last=True, once=True)
        for name in {0: "abc", 1: "cba", 2: "b"}[rig.rank]:
            rig.backward(**{name: 1.0})
        rig.finish()
        return rig.noted.labels

    labels = [f"gradients, bucket {i}: {name}" for i, name in enumerate("cba")]
    assert on(3, body) == [labels] * 3


def test_a_bucket_leaves_when_it_and_those_before_it_are_complete() -> None:
    """A complete bucket waits for the one before it, and then both go during backward."""
    (noted,) = on(1, _arrivals)
    assert noted == [[], [], ["c", "b", "a"]]


def _arrivals(rig: Rig) -> list[list[str]]:
    rig.buckets.begin(first=True, last=True)
    seen = []
    for name in "abc":
        rig.backward(**{name: 1.0})
        seen.append([label[-1] for label in rig.noted.labels])
    rig.finish()
    return seen


def test_labels_name_the_parameters() -> None:
    """A bucket's label says which parameters it carries."""

    def body(rig: Rig) -> list[str]:
        rig.buckets.begin(first=True, last=True)
        rig.finish()
        return rig.noted.labels

    assert on(1, body, bucket_bytes=16) == [["gradients, bucket 0: c to b (2 parameters)", "gradients, bucket 1: a"]]


def test_what_no_rank_used_has_no_gradient() -> None:
    """A parameter that nobody used gets none; one that some rank used gets the mean with zeros, on every rank."""

    def body(rig: Rig) -> Any:
        rig.buckets.begin(first=True, last=True)
        rig.backward(a=1.0, **({"b": 4.0} if rig.rank == 0 else {}))
        return rig.finish()

    assert on(2, body, bucket_bytes=1000) == [{"a": [1.0, 1.0], "b": [2.0, 2.0]}] * 2


def test_a_branch_not_taken_counts_as_zero() -> None:
    """Where a rank did not use a parameter, the step before leaves nothing of it in the mean."""

    def body(rig: Rig) -> Any:
        rig.buckets.begin(first=True, last=True)
        rig.backward(a=7.0, b=7.0, c=7.0)
        rig.finish()
        rig.buckets.begin(first=True, last=True)
        rig.backward(a=1.0, **({"b": 4.0} if rig.rank == 0 else {}))
        return rig.finish()

    assert on(2, body, bucket_bytes=1000) == [{"a": [1.0, 1.0], "b": [2.0, 2.0]}] * 2


def test_micro_batches_accumulate_and_are_sent_once() -> None:
    """Gradients of several micro-batches add up, and only the last one's backward sends."""

    def body(rig: Rig) -> Any:
        sent = []
        for k in range(3):
            rig.buckets.begin(first=k == 0, last=k == 2)
            rig.backward(a=1.0, b=rig.rank, c=k)
            sent.append(len(rig.noted.labels))
        return sent, rig.finish()

    for sent, found in on(2, body):
        assert sent == [0, 0, 3]
        assert found == {"a": [3.0] * 2, "b": [1.5] * 2, "c": [3.0] * 2}


def test_a_new_step_forgets_the_old_one() -> None:
    """After ``begin(first=True)`` nothing of the step before is left."""

    def body(rig: Rig) -> Any:
        rig.buckets.begin(first=True, last=True)
        rig.backward(a=5.0, b=5.0)
        rig.finish()
        rig.buckets.begin(first=True, last=True)
        rig.backward(a=1.0)
        return rig.finish()

    assert on(2, body) == [{"a": [1.0, 1.0]}] * 2


@pytest.mark.parametrize("bucket_bytes", [1, 1000])
def test_a_second_backward_adds_to_the_mean(bucket_bytes: int) -> None:
    """Gradients that come after a bucket has left are averaged and added."""

    def body(rig: Rig) -> Any:
        rig.buckets.begin(first=True, last=True)
        rig.backward(a=rig.rank, b=1.0, c=1.0)
        rig.backward(a=10.0, b=4.0 * rig.rank)
        return rig.finish()

    assert on(2, body, bucket_bytes=bucket_bytes) == [{"a": [10.5] * 2, "b": [3.0] * 2, "c": [1.0] * 2}] * 2


def test_gradients_leave_the_parameters() -> None:
    """A gradient exists once, in its bucket and its format; ``param.grad`` is dropped."""

    def body(rig: Rig) -> Any:
        rig.buckets.begin(first=True, last=True)
        rig.backward(a=1.0)
        means = rig.buckets.finish()
        return rig.params["a"].grad, means[rig.params["a"]].dtype

    assert on(1, body, dtype=torch.bfloat16) == [(None, torch.bfloat16)]


def test_sparse_gradients_become_dense() -> None:
    """An embedding's sparse gradient is averaged like any other."""

    def body(communicator: Any) -> Any:
        table = nn.Embedding(4, 1, sparse=True)
        buckets = GradientBuckets([("table", table.weight)], communicator, torch.float32)
        for k in range(2):
            buckets.begin(first=k == 0, last=k == 1)
            table(torch.tensor([communicator.rank, 3])).sum().backward()
        return buckets.finish()[table.weight].view(-1).tolist()

    assert LoopbackWorld(2).run(body) == [[1.0, 1.0, 0.0, 2.0]] * 2


def test_an_abandoned_step_can_be_drained() -> None:
    """After ``drain`` nothing is under way, and the next step is whole."""

    def body(rig: Rig) -> Any:
        rig.buckets.begin(first=True, last=True)
        rig.backward(a=9.0, b=9.0, c=9.0)
        rig.buckets.drain()
        rig.buckets.begin(first=True, last=True)
        rig.backward(a=1.0, b=1.0, c=1.0)
        return rig.finish()

    assert on(2, body) == [{name: [1.0, 1.0] for name in "abc"}] * 2


def test_closing_takes_the_hooks_off() -> None:
    """After ``close`` gradients stay with their parameters, as in plain torch."""

    def body(rig: Rig) -> Any:
        rig.buckets.close()
        rig.backward(a=2.0)
        return rig.params["a"].grad.tolist()  # type: ignore[union-attr]

    assert on(1, body) == [[2.0, 2.0]]
