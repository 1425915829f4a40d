"""Optimizer wrappers whose access to parameters has one fault each: the contract must catch every one."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import attrs
import pytest
import torch

from powertrain.access import keeping_writes
from powertrain.replicated import ReplicatedOptimizer
from powertrain.roles.communicator import WrappedCommunicator
from powertrain.roles.optimizer import Request
from powertrain.testing.optimizer import OptimizerWrapperContract


class Changed(ReplicatedOptimizer):
    """Shows changed parts."""

    def parts(self, param):
        parts = super().parts(param)
        return {key: self.change(key, piece, param) for key, piece in parts.items()}

    def change(self, key, piece, param):
        raise NotImplementedError


class ShowsTheModelsRounding(Changed):
    def change(self, key, piece, param):
        return attrs.evolve(piece, tensor=piece.tensor.to(torch.bfloat16)) if key == "value" else piece


class LentValuesAreCopies(Changed):
    def change(self, key, piece, param):
        return attrs.evolve(piece, tensor=piece.tensor.clone()) if key == "value" else piece


class LentMomentsAreCopies(Changed):
    def change(self, key, piece, param):
        return attrs.evolve(piece, tensor=piece.tensor.clone()) if key.startswith("optimizer") else piece


class CallsPartsByOtherNames(Changed):
    def change(self, key, piece, param):
        return attrs.evolve(piece, name=f"model/{piece.name}")


class StretchesTheStepCounter(Changed):
    def change(self, key, piece, param):
        if key != "optimizer/step":
            return piece
        return attrs.evolve(piece, shape=tuple(param.shape), tensor=piece.tensor.expand(param.numel()).clone())


class HasNoFrozenParts(ReplicatedOptimizer):
    def parts(self, param):
        return super().parts(param) if param.requires_grad else {}


class ShowsScaledGradients(ReplicatedOptimizer):
    def step(self, *, grad_scale, **rest):
        self.scale = grad_scale
        return super().step(grad_scale=grad_scale, **rest)

    def parts(self, param):
        parts = super().parts(param)
        if "grad" in parts:
            parts["grad"] = attrs.evolve(parts["grad"], tensor=parts["grad"].tensor * self.scale)
        return parts


class ShowsItsOwnGradients(ReplicatedOptimizer):
    """Keeps the gradients that backward made on this rank."""

    def __init__(self, model, optimizer, context):
        self.own = {}
        for param in model.parameters():
            if param.requires_grad:
                param.register_hook(lambda grad, param=param: self.own.__setitem__(param, grad.clone()))
        super().__init__(model, optimizer, context)

    def parts(self, param):
        parts = super().parts(param)
        if "grad" in parts and param in self.own:
            parts["grad"] = attrs.evolve(parts["grad"], tensor=self.own[param].reshape(-1))
        return parts


class ShowsZerosForUnusedParameters(ReplicatedOptimizer):
    def parts(self, param):
        parts = super().parts(param)
        parts.setdefault("grad", attrs.evolve(parts["value"], tensor=torch.zeros(param.numel())))
        return parts


class OneRankListsNoGradients(ReplicatedOptimizer):
    def parts(self, param):
        parts = super().parts(param)
        if self._communicator.rank == 1:
            parts.pop("grad", None)
        return parts


class ShowsGradientsTooLong(ReplicatedOptimizer):
    def begin(self, **arguments):
        self.old = {param: master.grad for param, master in self._masters.items()}
        super().begin(**arguments)

    def parts(self, param):
        parts = super().parts(param)
        if "grad" not in parts and getattr(self, "old", {}).get(param) is not None:
            parts["grad"] = attrs.evolve(parts["value"], tensor=self.old[param].reshape(-1))
        return parts


class ShowsDiscardedGradients(ReplicatedOptimizer):
    def _clear(self):
        pass

    def begin(self, **arguments):
        if self._first:
            super()._clear()
        super().begin(**arguments)


class NamesMomentsItsOwnWay(ReplicatedOptimizer):
    def parts(self, param):
        return {key.replace("exp_avg", "m"): piece for key, piece in super().parts(param).items()}


class PublishesNothing(ReplicatedOptimizer):
    def publish(self):
        pass


class PublishesOverWrites(ReplicatedOptimizer):
    def publish(self):
        written, self._written = self._written, set()
        super().publish()
        self._written = written


class KeepsNoWrites(ReplicatedOptimizer):
    def gathered(self, params, *, write=False):
        return nullcontext()


class KeepsWritesIntoTheModelOnly(ReplicatedOptimizer):
    @contextmanager
    def gathered(self, params, *, write=False):
        yield
        for param in params if write else ():
            self._communicator.broadcast(param.detach(), 0).wait()


class DropsWritesOnErrors(ReplicatedOptimizer):
    @contextmanager
    def gathered(self, params, *, write=False):
        if not write:
            yield
            return
        before = [param.detach().clone() for param in params]
        try:
            with keeping_writes(self, params, self._communicator):
                yield
        except Exception:
            for param, old in zip(params, before, strict=True):
                param.detach().copy_(old)
            raise


class FromTheLast(WrappedCommunicator):
    def issue(self, collective):
        return self.inner.issue(attrs.evolve(collective, peer=self.size("data") - 1))


class TheLastRankWins(ReplicatedOptimizer):
    def gathered(self, params, *, write=False):
        return keeping_writes(self, params, FromTheLast(self._communicator)) if write else nullcontext()


class RoundsMasters(ReplicatedOptimizer):
    @contextmanager
    def gathered(self, params, *, write=False):
        with super().gathered(params, write=write):
            yield
        for param in params if write else ():
            self._masters.get(param, param).detach().copy_(param)


class Empties(ReplicatedOptimizer):
    """Takes parameters away outside of blocks."""

    def take(self, params):
        for param in params:
            param.detach().zero_()

    def give(self, params):
        for param in params:
            param.detach().copy_(self.saved[param])


class GathersHalf(Empties):
    @contextmanager
    def gathered(self, params, *, write=False):
        self.saved = {param: param.detach().clone() for param in params}
        if self._communicator.rank:
            self.take(params[: len(params) // 2])
        with super().gathered(params, write=write):
            yield
        if not write:
            self.give(params)


class MayNotRunInside(Empties):
    """The first forward pass takes away what was gathered, as if each pass freed what it used."""

    @contextmanager
    def gathered(self, params, *, write=False):
        self.saved = {param: param.detach().clone() for param in params}
        module = self.model if hasattr(self, "model") else None
        with super().gathered(params, write=write):
            hook = module.register_forward_hook(lambda *_: self.take(params)) if module is not None else None
            yield
        if hook is not None:
            hook.remove()
        if not write:
            self.give(params)

    def __init__(self, model, optimizer, context):
        super().__init__(model, optimizer, context)
        self.model = model


class OneBlockEndsAll(Empties):
    """The end of any block takes away what others hold, until the last has ended."""

    opened = 0

    @contextmanager
    def gathered(self, params, *, write=False):
        if not self.opened:
            self.saved = {param: param.detach().clone() for param in self._names}
        self.opened += 1
        with super().gathered(params, write=write):
            yield
        self.opened -= 1
        if not write:
            (self.take if self.opened else self.give)(self._names)


class ScalesBehindListeners(ReplicatedOptimizer):
    def _run(self, optimizer):
        with optimizer.asked(Request(scale=self._scale)):
            optimizer.step()
        self._publish()


class TrustsThatTheOptimizerCasts(ReplicatedOptimizer):
    def _run(self, optimizer):
        with optimizer.asked(Request(scale=self._scale)):
            optimizer.step()


FAULTS = {
    ScalesBehindListeners: "test_step_hooks_see_what_the_update_uses",
    TrustsThatTheOptimizerCasts: "test_the_model_is_what_the_masters_round_to",
    ShowsTheModelsRounding: "test_parts_are_the_model",
    CallsPartsByOtherNames: "test_parts_are_the_model",
    HasNoFrozenParts: "test_parts_are_the_model",
    StretchesTheStepCounter: "test_parts_are_the_model",
    ShowsScaledGradients: "test_parts_show_the_mean_gradient",
    ShowsItsOwnGradients: "test_parts_show_the_mean_gradient",
    ShowsZerosForUnusedParameters: "test_parts_show_the_mean_gradient",
    OneRankListsNoGradients: "test_parts_show_the_mean_gradient",
    ShowsGradientsTooLong: "test_parts_show_the_mean_gradient",
    ShowsDiscardedGradients: "test_parts_show_the_mean_gradient",
    LentValuesAreCopies: "test_written_values_are_trained_on",
    LentMomentsAreCopies: "test_written_moments_are_trained_on",
    NamesMomentsItsOwnWay: "test_written_moments_are_trained_on",
    GathersHalf: "test_gathered_is_whole",
    MayNotRunInside: "test_gathered_is_whole",
    OneBlockEndsAll: "test_gathered_blocks_may_be_open_together",
    KeepsNoWrites: "test_gathered_keeps_what_the_first_rank_writes",
    DropsWritesOnErrors: "test_gathered_keeps_what_the_first_rank_writes",
    TheLastRankWins: "test_gathered_keeps_what_the_first_rank_writes",
    KeepsWritesIntoTheModelOnly: "test_unwritten_masters_keep_their_precision",
    RoundsMasters: "test_unwritten_masters_keep_their_precision",
    PublishesNothing: "test_the_model_follows_what_is_published",
    PublishesOverWrites: "test_the_model_follows_what_is_published",
}
"""Each fault, and the test that is there to catch it."""


@pytest.mark.parametrize(("fault", "test"), FAULTS.items())
def test_the_fault_is_caught(contract, fault, test):
    """A wrapper with one fault fails the test that is there for it, by an assertion about what it is for."""

    class Suite(OptimizerWrapperContract):
        def make(self, model, optimizer, context):
            return fault(model, optimizer, context)

    failures = contract.failures(Suite, test)
    assert failures, f"{test} passed"
    for _, error in failures:
        assert not isinstance(error, (NameError, AttributeError, TypeError)), error
