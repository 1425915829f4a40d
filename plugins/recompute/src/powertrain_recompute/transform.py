"""Chooses the blocks of a model, and lets them run as the policy says."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from powertrain.blocks import LISTS, choose_blocks
from powertrain.errors import ShardingError
from powertrain.forward import Run, detour
from powertrain.text import some
from powertrain_recompute.again import Again
from powertrain_recompute.caches import check_switch, refuse_caches
from powertrain_recompute.compiled import Compiled, budgeted, check_not_compiled
from powertrain_recompute.config import RecomputeConfig
from powertrain_recompute.operators import DEFAULT, named, operators
from powertrain_recompute.statistics import Statistics

_log = logging.getLogger("powertrain.recompute")

EVERY = 2
BUDGET = 0.5


def recompute(
    model: torch.nn.Module, config: RecomputeConfig, device: torch.device, backend: str = "inductor"
) -> list[Callable[[], None]]:
    """Let the blocks of a model be recomputed in backward, in place.

    Args:
        model: its modules stay what they are.
        config: the policy.
        device: on which it runs.
        backend: that compiles, under the policy "budget".

    Returns:
        What undoes it.

    Raises:
        ShardingError: the model has no such blocks, fewer than ``every``, or recomputes them itself.
        CompilerMissing: the policy needs a compiler.
    """
    if config.policy == "none":
        return []
    blocks = find_blocks(model, config)
    check_switch(model)
    every = (config.every or EVERY) if config.policy == "every" else 1
    if every > len(blocks):
        raise ShardingError(
            f"every = {every} is more than the model has blocks",
            where="recompute.every",
            expected=f"a number from 1 to {len(blocks)}, which are there: {some(list(blocks))}",
            found=str(every),
            remedy="make it smaller, or name smaller blocks in recompute.blocks",
        )
    # The last blocks are recomputed as soon as they have run: of each ``every``, the first gains most.
    chosen = dict(list(blocks.items())[::every])
    make = _maker(config, chosen, device, backend)
    undo = [detour(module, make(module)) for module in chosen.values()]
    caches = [] if config.policy == "budget" else refuse_caches(model, chosen.values())
    _log.info(
        "recompute: %s, %d of %d blocks (%s)%s%s",
        config.policy,
        len(chosen),
        len(blocks),
        ", ".join(Counter(_class_of(module) for module in blocks.values())),
        _details(config),
        "; no cache of keys and values while gradients are taken" if caches else "",
    )
    return undo + caches


def find_blocks(model: torch.nn.Module, config: RecomputeConfig) -> dict[str, torch.nn.Module]:
    """Return the blocks by their paths, in the model's order; of nested ones the outer.

    Raises:
        ShardingError: there are none, or one is never called.
    """
    paths = choose_blocks(model, config.blocks, where="recompute.blocks")
    if not paths:
        raise ShardingError(
            "the model repeats no block, so there is nothing that recomputing would spare",
            where="recompute.blocks",
            expected="a list of modules of one class",
            found=some([f"{name} ({type(child).__name__})" for name, child in model.named_children()])
            or "a model without modules within",
            remedy="name the modules to recompute in recompute.blocks, by class or by path",
        )
    outer: dict[str, torch.nn.Module] = {}
    for path in paths:
        if not any(path.startswith(other + ".") for other in outer):
            outer[path] = model.get_submodule(path)
    for path, module in outer.items():
        if isinstance(module, LISTS):
            raise ShardingError(
                f"{path} is a list of modules, which is never called itself",
                where="recompute.blocks",
                expected="modules with a forward of their own",
                found=repr(config.blocks),
                remedy=f'name the class of its members, or write "{path}.*"',
            )
    return outer


def _maker(
    config: RecomputeConfig, chosen: dict[str, torch.nn.Module], device: torch.device, backend: str
) -> Callable[[torch.nn.Module], Run]:
    """Return what makes the runs of single blocks."""
    if config.policy == "budget":
        for path, module in chosen.items():
            check_not_compiled(path, module)
        compiler = budgeted(BUDGET if config.budget is None else config.budget, device, backend)
        return lambda module: Compiled(compiler)
    saved: frozenset[Any] = frozenset()
    if config.policy == "selective":
        saved = operators(DEFAULT if config.save is None else config.save)
    return lambda module: Again(Statistics.of(module), saved)


def _details(config: RecomputeConfig) -> str:
    if config.policy == "selective":
        return f", keeping {', '.join(named(DEFAULT if config.save is None else config.save))}"
    if config.policy == "budget":
        return f", keeping {BUDGET if config.budget is None else config.budget:g} of what compiled code keeps"
    return ""


def _class_of(module: torch.nn.Module) -> str:
    return type(getattr(module, "_orig_mod", module)).__name__
