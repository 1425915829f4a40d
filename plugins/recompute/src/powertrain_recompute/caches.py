"""Model libraries: their own recomputation, and caches of keys and values, which a second run would fill twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from powertrain.errors import ShardingError

FLAGS = ("gradient_checkpointing", "grad_checkpointing")
"""What transformers and diffusers, and timm, call their own switch."""


def check_switch(model: torch.nn.Module) -> None:
    """Refuse a model that recomputes its blocks by itself.

    Raises:
        ShardingError: a model library's own switch is on.
    """
    for path, module in model.named_modules():
        for flag in FLAGS:
            if vars(module).get(flag) is True:
                raise ShardingError(
                    "the model recomputes its blocks already, by its library's own switch",
                    where=path or type(module).__name__,
                    expected=f"{flag} = False",
                    found=f"{flag} = True",
                    remedy="leave that switch off (model.gradient_checkpointing_disable()), or leave [recompute] out",
                )


def refuse_caches(model: torch.nn.Module, blocks: Iterable[torch.nn.Module]) -> list[Callable[[], None]]:
    """Let the models around recomputed blocks make no cache of keys and values while gradients are taken.

    Returns:
        What undoes it; empty where no model makes one.
    """
    recomputed = set(blocks)
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        if not getattr(getattr(module, "config", None), "use_cache", False) or module in recomputed:
            continue
        if "use_cache" not in inspect.signature(module.forward).parameters or recomputed.isdisjoint(module.modules()):
            continue
        undo.append(module.register_forward_pre_hook(_without_cache, with_kwargs=True).remove)
    return undo


def _without_cache(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not torch.is_grad_enabled():
        return None
    return args, {**kwargs, "use_cache": False}


def check_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse to run a block again that is given a cache.

    Raises:
        ShardingError: one is among the arguments.
    """
    for value in (*args, *kwargs.values()):
        if hasattr(value, "get_seq_length"):
            raise ShardingError(
                "a block that is recomputed is given a cache of keys and values, which its second run would fill again",
                where=type(value).__name__,
                expected="a pass without a cache while gradients are taken",
                remedy="call the model with use_cache=False and without past_key_values, or under torch.no_grad(); "
                'or set recompute.policy = "none"',
            )
