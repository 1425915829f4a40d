"""What every optimizer wrapper must do, as a class of tests.

A wrapper is driven the way an engine drives it, on ranks that are threads,
and compared with a plain PyTorch loop over the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch

from powertrain.context import Context
from powertrain.errors import CheckpointError, ParameterFreed
from powertrain.roles.communicator import Communicator
from powertrain.roles.optimizer import OptimizerWrapper
from powertrain.testing.loopback import LoopbackWorld
from powertrain.testing.optimizer_access import ParameterAccessContract
from powertrain.testing.surroundings import make_context
from powertrain.testing.training import (
    Branches,
    Recipe,
    Rig,
    Trace,
    adamw,
    check,
    close_to,
    first_half,
    flat_adamw,
    parameters_of,
    plain,
    whole,
)

Body = Callable[[Rig], Any]

both = pytest.mark.parametrize("optimizer", [adamw, flat_adamw], ids=["torch", "flat"])
"""An optimizer of torch, and one that scales and casts on its way."""


class OptimizerWrapperContract(ParameterAccessContract):
    """Tests of one wrapper.

    Attributes:
        config: the configuration of the wrapper's context.
        keeps_model_whole: whether the model's parameters are whole on each rank, also after ``close``.
        low_precision: whether it converts the model where the recipe computes in fewer bits.
    """

    config: ClassVar[dict[str, Any]] = {}
    keeps_model_whole: ClassVar[bool] = True
    low_precision: ClassVar[bool] = False

    def make(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, context: Context) -> OptimizerWrapper:
        """Return the wrapper of ``optimizer``."""
        raise NotImplementedError

    def on_ranks(
        self, recipe: Recipe, body: Body, *, seed: int = 0, width: int = 5, config: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Run ``body(rig)`` on each rank of the recipe, each with a model of its own that equals the others'."""
        settings = self.config if config is None else config
        models = [Branches(seed, width) for _ in range(recipe.ranks)]

        def run(communicator: Communicator) -> Any:
            model = models[communicator.rank]
            optimizer = recipe.optimizer([param for param in model.parameters() if param.requires_grad])
            wrapper = self.make(model, optimizer, make_context(communicator, settings))
            try:
                return body(Rig(model, wrapper, communicator.rank, recipe))
            finally:
                wrapper.close()

        return LoopbackWorld(recipe.ranks).run(run)

    def compare(self, recipe: Recipe) -> None:
        """Run the recipe both ways and compare every step."""
        check(plain(recipe), self.on_ranks(recipe, lambda rig: rig.train(range(recipe.steps))), recipe)

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_is_the_plain_loop(self, ranks: int, accumulation: int) -> None:
        """Momentum SGD gives the plain loop's losses, norms and parameters, however the batch is split."""
        self.compare(Recipe(ranks=ranks, accumulation=accumulation))

    @both
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_is_the_plain_loop_with_adamw(self, ranks: int, optimizer: Any) -> None:
        """AdamW gives the plain loop's result; parameters that nobody uses do not even decay."""
        self.compare(Recipe(ranks=ranks, accumulation=2, optimizer=optimizer))

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_clips_by_the_global_norm(self, ranks: int) -> None:
        """Gradients are clipped by the norm of the mean over all ranks, which is also what it reports."""
        self.compare(Recipe(ranks=ranks, accumulation=2, clip=0.05))

    @both
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_divides_by_the_scale(self, ranks: int, optimizer: Any) -> None:
        """A factor on the loss is taken out before clipping, and of the norm."""
        self.compare(Recipe(ranks=ranks, scale=1024.0, clip=0.05, optimizer=optimizer))

    @both
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_skips_overflows(self, ranks: int, optimizer: Any) -> None:
        """A gradient that is not finite on one rank skips the step on all, and leaves no trace."""
        self.compare(Recipe(ranks=ranks, overflow=1, scale=8.0, clip=0.05, optimizer=optimizer))

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_ranks_may_take_different_branches(self, accumulation: int) -> None:
        """A parameter that only one rank or micro-batch uses is averaged with zeros, and nobody waits for ever."""
        self.compare(Recipe(ranks=2, accumulation=accumulation, branch=first_half))
        self.compare(Recipe(ranks=2, accumulation=accumulation, branch=first_half, optimizer=flat_adamw))

    def test_ranks_stay_equal(self) -> None:
        """After several steps every rank holds the same bits."""
        recipe = Recipe(ranks=2, optimizer=adamw)
        states = [trace.states[-1] for trace in self.on_ranks(recipe, lambda rig: rig.train(range(recipe.steps)))]
        pieces = [{(p.name, p.start): p.tensor for p in state.tensors} for state in states]
        for key in pieces[0].keys() & pieces[1].keys():
            assert torch.equal(pieces[0][key], pieces[1][key]), f"{key[0]} differs between ranks"

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_discard_forgets(self, ranks: int) -> None:
        """Gradients that were discarded, mid-accumulation too, have no influence."""
        recipe = Recipe(ranks=ranks, accumulation=2)

        def body(rig: Rig) -> Trace:
            rig.accumulate(100)
            rig.wrapper.discard()
            rig.wrapper.begin(last=False)
            rig.model(torch.ones(2, 6)).sum().backward()
            rig.wrapper.discard()
            rig.trace.losses.clear()
            return rig.train(range(recipe.steps))

        check(plain(recipe), self.on_ranks(recipe, body), recipe)

    def test_follows_the_learning_rate(self) -> None:
        """Changing a group's rate on ``optimizer`` changes the next update."""
        recipe = Recipe(steps=1)

        def body(rig: Rig) -> Trace:
            for group in rig.wrapper.optimizer.param_groups:
                group["lr"] = 0.0
            return rig.train([0])

        before = {name: param.detach() for name, param in Branches().named_parameters()}
        (trace,) = self.on_ranks(recipe, body)
        close_to(parameters_of(whole([trace.states[0]])), before)

    def test_lists_the_whole_state(self) -> None:
        """The slices of all ranks are the whole model, frozen and tied parameters once, by their own names."""
        recipe = Recipe(ranks=2)
        states = self.on_ranks(recipe, lambda rig: rig.train(range(recipe.steps)).states[-1])
        reader = whole(states)
        shapes = {name: tuple(param.shape) for name, param in Branches().named_parameters()}
        assert {name: tuple(t.shape) for name, t in parameters_of(reader).items()} == shapes
        assert "optimizer/body.weight/momentum_buffer" in reader.whole
        kinds = {name.split("/")[0] for name in reader.whole}
        assert kinds == {"model", "optimizer"}
        for state in states:
            assert all(piece.tensor.is_contiguous() and piece.tensor.dim() == 1 for piece in state.tensors)

    @pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 3)])
    def test_continues_from_its_state(self, before: int, after: int) -> None:
        """A new wrapper on another number of ranks, given the state, continues as if nothing had happened."""
        # Six micro-batches a step divide among one, two and three ranks alike.
        old = Recipe(ranks=before, accumulation=6 // before, optimizer=adamw)
        new = Recipe(ranks=after, accumulation=6 // after, optimizer=adamw)
        reader = whole(self.on_ranks(old, lambda rig: rig.train([0, 1]).states[-1]))

        def body(rig: Rig) -> Trace:
            loaded = rig.wrapper.load(reader)
            assert {f"model/{name}" for name, _ in rig.model.named_parameters()} <= set(loaded)
            return rig.train([2, 3])

        traces = self.on_ranks(new, body, seed=1)
        expected = plain(old)
        for k in range(2):
            close_to(parameters_of(whole([trace.states[k] for trace in traces])), expected.parameters[2 + k])

    def test_refuses_another_model(self) -> None:
        """The state of a model of other shapes is a CheckpointError."""
        recipe = Recipe()
        reader = whole(self.on_ranks(recipe, lambda rig: rig.train([0]).states[-1]))

        def body(rig: Rig) -> None:
            with pytest.raises(CheckpointError):
                rig.wrapper.load(reader)

        self.on_ranks(recipe, body, width=4)

    def test_close_lets_the_model_go(self) -> None:
        """After ``close``, backward fills plain gradients and meets no hook."""

        def body(rig: Rig) -> torch.nn.Module:
            rig.train([0])
            return rig.model

        for model in self.on_ranks(Recipe(ranks=2), body):
            if not self.keeps_model_whole:
                with pytest.raises(ParameterFreed, match=r"body\.weight"):
                    model(torch.ones(2, 6))
                continue
            for param in model.parameters():
                param.grad = None
            model(torch.ones(2, 6)).sum().backward()
            assert model.body.weight.grad is not None
            assert torch.equal(model.head.bias.grad, torch.tensor([2.0]))
