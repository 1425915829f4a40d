"""What every optimizer wrapper must do for access to single parameters, as tests that its contract includes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import attrs
import pytest
import torch

from powertrain.pieces import index
from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain.testing.training import (
    Branches,
    Parameters,
    Recipe,
    Rig,
    Trace,
    adamw,
    check,
    close_to,
    first_half,
    flat_adamw,
    loss_of,
    plain,
    whole,
)

Parts = dict[str, dict[str, TensorSlice]]
"""What one rank holds, by parameter and key."""

LOW: Mapping[str, Any] = {"precision": {"compute": "bf16"}}
"""A configuration in which the model is rounded, and the masters are not."""


def named(rig: Rig) -> dict[str, torch.nn.Parameter]:
    """Return the model's parameters by name."""
    return dict(rig.model.named_parameters())


def copied(rig: Rig) -> Parts:
    """Return a copy of what this rank holds."""
    return {
        name: {key: attrs.evolve(piece, tensor=piece.tensor.clone()) for key, piece in rig.wrapper.parts(param).items()}
        for name, param in named(rig).items()
    }


def joined(ranks: Sequence[Parts], key: str) -> Parameters:
    """Return what the slices of all ranks under one key are together, by parameter."""
    states = [
        Snapshot(tensors=[parts[key] for parts in held.values() if key in parts], values={}, rank_values={})
        for held in ranks
    ]
    return dict(whole(states).whole)


def other(tensor: torch.Tensor) -> torch.Tensor:
    """Return other values for a parameter."""
    return torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)


def put(piece: TensorSlice, tensor: torch.Tensor) -> None:
    """Write this rank's part of a whole tensor."""
    for box, chunk in piece.chunks():
        chunk.copy_(tensor[index(box)])


def replace(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give the plain loop's parameters other values after its second step."""
    if step == 1:
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(other(param))


class ParameterAccessContract:
    """Tests of ``parts``, ``publish`` and ``gathered``."""

    config: ClassVar[dict[str, Any]]
    keeps_model_whole: ClassVar[bool]
    low_precision: ClassVar[bool]
    on_ranks: Callable[..., list[Any]]

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_parts_are_the_model(self, ranks: int) -> None:
        """The ranks' values of each parameter, frozen and unused ones too, are flat slices of the whole of it."""
        recipe = Recipe(ranks=ranks, optimizer=adamw)

        def body(rig: Rig) -> Parts:
            rig.train(range(recipe.steps))
            for name, param in named(rig).items():
                for key, piece in rig.wrapper.parts(param).items():
                    assert piece.name == name
                    assert tuple(piece.shape) == (() if key == "optimizer/step" else tuple(param.shape)), key
                    assert piece.tensor.dim() == 1
                    assert piece.tensor.is_contiguous()
            return copied(rig)

        close_to(joined(self.on_ranks(recipe, body), "value"), plain(recipe).parameters[-1])

    @pytest.mark.parametrize("optimizer", [adamw, flat_adamw], ids=["torch", "flat"])
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_parts_show_the_mean_gradient(self, ranks: int, optimizer: Any) -> None:
        """From a step to the next micro-batch the mean gradient is there, unscaled and clipped, on all ranks."""
        recipe = Recipe(ranks=ranks, accumulation=2, scale=1024.0, clip=0.05, branch=first_half, optimizer=optimizer)

        def body(rig: Rig) -> list[Parts]:
            found = []
            for step in range(recipe.steps):
                rig.train([step])
                found.append(copied(rig))
            rig.wrapper.begin(last=False)
            loss_of(rig.model, 0, 0, recipe).backward()
            assert not [name for name, parts in copied(rig).items() if "grad" in parts], "gradients of no step"
            rig.wrapper.discard()
            assert not [name for name, parts in copied(rig).items() if "grad" in parts], "discarded gradients"
            return found

        runs = self.on_ranks(recipe, body)
        for step, expected in enumerate(plain(recipe).gradients):
            ranks_parts = [found[step] for found in runs]
            close_to(joined(ranks_parts, "grad"), expected)
            for held in ranks_parts:
                assert {name for name, parts in held.items() if "grad" in parts} == expected.keys()

    @pytest.mark.parametrize("optimizer", [adamw, flat_adamw], ids=["torch", "flat"])
    @pytest.mark.parametrize("ranks", [1, 2])
    @pytest.mark.parametrize("accumulate", ["fp32", "bf16"])
    def test_step_hooks_see_what_the_update_uses(self, ranks: int, optimizer: Any, accumulate: str) -> None:
        """Who listens to the optimizer's steps hears of one a step, with gradients unscaled and clipped."""
        recipe = Recipe(ranks=ranks, scale=1024.0, clip=0.05, optimizer=optimizer)
        config = {**self.config, "precision": {"reduce": accumulate, "accumulate": accumulate}}

        def body(rig: Rig) -> None:
            seen: list[list[torch.Tensor]] = []

            def listen(optimizer: torch.optim.Optimizer, *_: Any) -> None:
                grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
                seen.append([grad.detach().flatten().float() + 0 for grad in grads if grad is not None])

            rig.wrapper.optimizer.register_step_pre_hook(listen)
            rig.train([0, 1])
            assert len(seen) == 2
            shown = [parts["grad"].tensor.flatten().float() for parts in copied(rig).values() if "grad" in parts]
            shown = [grad for grad in shown if grad.numel()]
            assert shown
            assert len(seen[1]) == len(shown)
            for grad in shown:
                near = [torch.allclose(grad, other, rtol=1e-2) for other in seen[1] if other.shape == grad.shape]
                assert any(near), "a listener saw other gradients than the update's"

        self.on_ranks(recipe, body, config=config)

    @pytest.mark.parametrize("optimizer", [adamw, flat_adamw], ids=["torch", "flat"])
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_the_model_is_what_the_masters_round_to(self, ranks: int, optimizer: Any) -> None:
        """In low precision the model has, bit for bit, the rounded masters, whoever rounds them."""
        recipe = Recipe(ranks=ranks, optimizer=optimizer, branch=first_half)

        def body(rig: Rig) -> tuple[Parts, dict[str, torch.Tensor]]:
            rig.train([0, 1, 2])
            held = copied(rig)
            with rig.wrapper.gathered(list(rig.model.parameters())):
                return held, {name: param.detach().clone() for name, param in named(rig).items()}

        results = self.on_ranks(recipe, body, config={**self.config, **LOW})
        masters = joined([held for held, _ in results], "value")
        for _, model in results:
            for name, param in model.items():
                assert not self.low_precision or param.dtype == torch.bfloat16
                assert torch.equal(param, masters[name].to(param.dtype)), f"{name} is not what its master rounds to"

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_written_values_are_trained_on(self, ranks: int) -> None:
        """Values written into the slices and published are what the next steps start from."""
        recipe = Recipe(ranks=ranks, accumulation=2)

        def body(rig: Rig) -> Trace:
            rig.train([0, 1])
            for param in named(rig).values():
                piece = rig.wrapper.parts(param)["value"]
                put(piece, other(torch.empty(piece.shape)))
            rig.wrapper.publish()
            return rig.train([2, 3])

        check(plain(recipe, replace), self.on_ranks(recipe, body), recipe)

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_written_moments_are_trained_on(self, ranks: int) -> None:
        """The optimizer's tensors are there under torch's keys; what is written into them changes the next steps."""
        recipe = Recipe(ranks=ranks, optimizer=adamw)

        def edit(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
            for state in optimizer.state.values() if step == 1 else ():
                state["exp_avg"].mul_(-3)
                state["step"].fill_(9)

        held: list[Parts] = []

        def body(rig: Rig) -> Trace:
            rig.train([0, 1])
            held.append(copied(rig))
            for param in named(rig).values():
                parts = rig.wrapper.parts(param)
                if "optimizer/exp_avg" in parts:
                    parts["optimizer/exp_avg"].tensor.mul_(-3)
                    parts["optimizer/step"].tensor.fill_(9)
            rig.wrapper.publish()
            return rig.train([2, 3])

        traces = self.on_ranks(recipe, body)
        shapes = {name: tuple(param.shape) for name, param in Branches().named_parameters()}
        used = [name for name in shapes if not name.startswith(("frozen", "never"))]
        for key in ("exp_avg", "exp_avg_sq", "step"):
            found = {name: tuple(tensor.shape) for name, tensor in joined(held, f"optimizer/{key}").items()}
            assert found == {name: () if key == "step" else shapes[name] for name in used}
        check(plain(recipe, edit), traces, recipe)

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_gathered_is_whole(self, ranks: int) -> None:
        """Inside a block every rank has the whole values, the model may run, and training goes on as before."""
        recipe = Recipe(ranks=ranks)
        expected = plain(recipe)

        def body(rig: Rig) -> Trace:
            rig.train([0, 1])
            inputs = torch.ones(2, 6)
            with rig.wrapper.gathered(list(rig.model.parameters())), torch.no_grad():
                outputs = [rig.model(inputs) for _ in range(2)]
                assert torch.equal(*outputs)
                close_to({name: param.detach() for name, param in named(rig).items()}, expected.parameters[1])
                reference = Branches()
                reference.load_state_dict(expected.parameters[1])
                torch.testing.assert_close(outputs[0], reference(inputs), rtol=1e-5, atol=1e-6)
            return rig.train([2, 3])

        check(expected, self.on_ranks(recipe, body), recipe)

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_gathered_blocks_may_be_open_together(self, ranks: int) -> None:
        """The end of a block of some parameters leaves those of the others whole, whichever ends first."""
        recipe = Recipe(ranks=ranks)
        expected = plain(recipe)

        def body(rig: Rig) -> Trace:
            rig.train([0, 1])
            params = named(rig)
            for first_ends in (False, True):
                with ExitStack() as first, ExitStack() as second:
                    first.enter_context(rig.wrapper.gathered([params["body.weight"], params["head.bias"]]))
                    second.enter_context(rig.wrapper.gathered([params["head.weight"], params["body.bias"]]))
                    (first if first_ends else second).close()
                    left = ["head.weight", "body.bias"] if first_ends else ["body.weight", "head.bias"]
                    found = {name: params[name].detach() for name in left}
                    close_to(found, {name: expected.parameters[1][name] for name in left})
            return rig.train([2, 3])

        check(expected, self.on_ranks(recipe, body), recipe)

    @pytest.mark.parametrize("raises", [False, True])
    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_gathered_keeps_what_the_first_rank_writes(self, ranks: int, raises: bool) -> None:
        """With ``write`` the first rank's values win on all, also when an exception ends the block."""
        recipe = Recipe(ranks=ranks)

        def body(rig: Rig) -> Trace:
            rig.train([0, 1])
            try:
                with rig.wrapper.gathered(list(rig.model.parameters()), write=True), torch.no_grad():
                    for param in rig.model.parameters():
                        param.copy_(other(param) + rig.rank)
                    if raises:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                assert raises
            return rig.train([2, 3])

        check(plain(recipe, replace), self.on_ranks(recipe, body), recipe)

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_unwritten_masters_keep_their_precision(self, ranks: int) -> None:
        """In low precision, a block that writes one element changes that element's master, and no other."""
        expected = {name: param.detach().clone() for name, param in Branches().named_parameters()}
        expected["body.weight"][0, 0] = 3

        def body(rig: Rig) -> Parts:
            with rig.wrapper.gathered(list(rig.model.parameters()), write=True), torch.no_grad():
                named(rig)["body.weight"][0, 0] = 3 + rig.rank
            return copied(rig)

        found = joined(self.on_ranks(Recipe(ranks=ranks), body, config={**self.config, **LOW}), "value")
        for name, tensor in expected.items():
            if not name.startswith("frozen"):  # without a master there is nothing more exact
                assert torch.equal(found[name], tensor), f"{name} has lost precision, or what was written"

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_the_model_follows_what_is_published(self, ranks: int) -> None:
        """In low precision as well; also inside a block, where parameters that may be written are left alone."""

        def body(rig: Rig) -> None:
            params, wrapper = named(rig), rig.wrapper
            for param in params.values():
                piece = wrapper.parts(param)["value"]
                put(piece, other(torch.empty(piece.shape)))
            wrapper.publish()
            if self.keeps_model_whole:
                follows(params, 1)
            with wrapper.gathered(list(params.values())):
                follows(params, 1)
            weight, bias = params["body.weight"], params["head.bias"]
            with wrapper.gathered([weight]), wrapper.gathered([bias], write=True), torch.no_grad():
                bias.fill_(7)
                piece = wrapper.parts(weight)["value"]
                put(piece, 2 * other(torch.empty(piece.shape)))
                wrapper.publish()
                assert bias.tolist() == [7], "a write that was under way is lost"
                follows({"body.weight": weight}, 2)
            with wrapper.gathered([weight, bias]):
                follows({"body.weight": weight}, 2)
                assert bias.tolist() == [7]

        def follows(params: Mapping[str, torch.nn.Parameter], factor: int) -> None:
            for name, param in params.items():
                expected = (factor * other(param)).to(param.dtype)
                assert not self.low_precision or param.dtype == torch.bfloat16
                assert torch.equal(param.detach(), expected), f"{name} does not follow"

        self.on_ranks(Recipe(ranks=ranks), body, config={**self.config, **LOW})
