"""Optimizer wrappers with one fault each: the contract must catch every one."""

from __future__ import annotations

import attrs
import pytest
import torch

from powertrain.replicated import ReplicatedOptimizer
from powertrain.roles.communicator import SingleProcess, WrappedCommunicator
from powertrain.roles.optimizer import Update
from powertrain.testing.optimizer import OptimizerWrapperContract


class ClipsByTheLocalNorm(ReplicatedOptimizer):
    def __init__(self, model, optimizer, context):
        super().__init__(model, optimizer, context)
        self.trainable = [param for param in model.parameters() if param.requires_grad]

    def step(self, *, grad_scale, clip, check_overflow):
        if clip is None:
            return super().step(grad_scale=grad_scale, clip=clip, check_overflow=check_overflow)
        self._deliver()
        total = torch.nn.utils.clip_grad_norm_(self.trainable[:2], clip)
        self.optimizer.step()
        self._first = True
        return Update(applied=True, grad_norm=lambda: total)


class AppliesAnOverflow(ReplicatedOptimizer):
    def step(self, *, grad_scale, clip, check_overflow):
        return super().step(grad_scale=grad_scale, clip=clip, check_overflow=False)


class HidesAnOverflow(ReplicatedOptimizer):
    def step(self, *, grad_scale, clip, check_overflow):
        update = super().step(grad_scale=grad_scale, clip=clip, check_overflow=check_overflow)
        return attrs.evolve(update, applied=True)


class ForgetsToClear(ReplicatedOptimizer):
    def step(self, **arguments):
        update = super().step(**arguments)
        self._first = False
        return update


class IgnoresTheScale(ReplicatedOptimizer):
    def step(self, *, grad_scale, clip, check_overflow):
        return super().step(grad_scale=1.0, clip=clip, check_overflow=check_overflow)


class IgnoresTheClip(ReplicatedOptimizer):
    def step(self, *, grad_scale, clip, check_overflow):
        return super().step(grad_scale=grad_scale, clip=None, check_overflow=check_overflow)


class Sums(WrappedCommunicator):
    def issue(self, collective):
        return self.inner.issue(attrs.evolve(collective, reduction="sum"))


class SumsOverRanks(ReplicatedOptimizer):
    def __init__(self, model, optimizer, context):
        super().__init__(model, optimizer, attrs.evolve(context, communicator=Sums(context.communicator)))


class NeverReduces(ReplicatedOptimizer):
    def __init__(self, model, optimizer, context):
        alone = SingleProcess(context.mesh, context.device)
        super().__init__(model, optimizer, attrs.evolve(context, communicator=alone))


class KeepsWhatWasDiscarded(ReplicatedOptimizer):
    def discard(self):
        pass


class LeavesOutFrozenParameters(ReplicatedOptimizer):
    def __init__(self, model, optimizer, context):
        super().__init__(model, optimizer, context)
        self._frozen = []


class SavesNoMoments(ReplicatedOptimizer):
    def tensors(self):
        return [piece for piece in super().tensors() if piece.name.startswith("model/")]


class RenamesParameters(ReplicatedOptimizer):
    def tensors(self):
        return [attrs.evolve(piece, name=piece.name.replace("body", "module.body")) for piece in super().tensors()]


class LoadsNoMoments(ReplicatedOptimizer):
    def load(self, reader):
        names = super().load(reader)
        self.optimizer.state.clear()
        return names


class DecaysUnusedParameters(ReplicatedOptimizer):
    def _deliver(self):
        super()._deliver()
        for master in self._masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)


class LeavesItsHooks(ReplicatedOptimizer):
    def close(self):
        pass


class ReportsTheClippedNorm(ReplicatedOptimizer):
    def step(self, *, grad_scale, clip, check_overflow):
        update = super().step(grad_scale=grad_scale, clip=clip, check_overflow=check_overflow)
        norm = update.grad_norm()
        return attrs.evolve(update, grad_norm=lambda: norm if clip is None else norm.clamp(max=clip))


FAULTS = {
    ClipsByTheLocalNorm: "test_clips_by_the_global_norm",
    AppliesAnOverflow: "test_skips_overflows",
    HidesAnOverflow: "test_skips_overflows",
    ForgetsToClear: "test_is_the_plain_loop",
    IgnoresTheScale: "test_divides_by_the_scale",
    IgnoresTheClip: "test_clips_by_the_global_norm",
    SumsOverRanks: "test_is_the_plain_loop",
    NeverReduces: "test_ranks_stay_equal",
    KeepsWhatWasDiscarded: "test_discard_forgets",
    LeavesOutFrozenParameters: "test_lists_the_whole_state",
    SavesNoMoments: "test_lists_the_whole_state",
    RenamesParameters: "test_lists_the_whole_state",
    LoadsNoMoments: "test_continues_from_its_state",
    DecaysUnusedParameters: "test_is_the_plain_loop_with_adamw",
    LeavesItsHooks: "test_close_lets_the_model_go",
    ReportsTheClippedNorm: "test_clips_by_the_global_norm",
}
"""Each fault, and the test that is there to catch it."""


def suite(wrapper):
    class Suite(OptimizerWrapperContract):
        def make(self, model, optimizer, context):
            return wrapper(model, optimizer, context)

    return Suite


def test_the_healthy_one_passes(contract):
    """A wrapper without a fault fails no test."""
    assert contract.failures(suite(ReplicatedOptimizer)) == []


@pytest.mark.parametrize(("fault", "test"), FAULTS.items())
def test_the_fault_is_caught(contract, fault, test):
    """A wrapper with one fault fails the test that is there for it."""
    assert contract.failures(suite(fault), test), f"{test} passed"
