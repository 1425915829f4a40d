"""Runs a block without keeping what it computes, and again when backward needs that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import attrs
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from powertrain_recompute.caches import check_arguments
from powertrain_recompute.results import keep
from powertrain_recompute.statistics import Statistics

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


@attrs.frozen
class Again:
    """Runs a module's forward under torch's non-reentrant checkpointing: random numbers and autocast are as before.

    Without gradients, it runs as it is.

    Attributes:
        statistics: of the module: batch norms, which are to count a batch once.
        saved: operators whose results are kept.
    """

    statistics: Statistics
    saved: frozenset[Any] = frozenset()

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what ``forward`` returns."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        check_arguments(args, kwargs)
        # Only tensors that the checkpoint is given by themselves are saved as autograd saves them: checked for
        # writes in place, and seen by hooks that take saved tensors elsewhere.
        tensors: list[torch.Tensor] = []
        places = [_taken(value, tensors) for value in args], {n: _taken(v, tensors) for n, v in kwargs.items()}

        def run(*given: torch.Tensor) -> Any:
            positional, named = places
            return forward(*(_put(v, given) for v in positional), **{n: _put(v, given) for n, v in named.items()})

        # A compiler keeps what a module writes out of the second run by itself.
        statistics = self.statistics.modules and not torch.compiler.is_compiling()
        if self.saved or statistics:
            return checkpoint(run, *tensors, use_reentrant=False, context_fn=self.contexts)
        return checkpoint(run, *tensors, use_reentrant=False)

    def contexts(self) -> Contexts:
        """Return what surrounds the first run, and the second."""
        first: AbstractContextManager[Any] = nullcontext()
        second: AbstractContextManager[Any] = nullcontext()
        compiling = torch.compiler.is_compiling()
        if self.saved:
            # A compiler knows what these mean, which want the very same operators in both runs, a plugin's hooks too.
            first, second = create_selective_checkpoint_contexts(list(self.saved)) if compiling else keep(self.saved)
        if self.statistics.modules and not compiling:
            second = _both(second, self.statistics.unchanged())
        return first, second


@contextmanager
def _both(one: AbstractContextManager[Any], other: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(one)
        stack.enter_context(other)
        yield


@attrs.frozen
class _Place:
    """Where a tensor was."""

    index: int


def _taken(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Move the tensors of an argument to ``tensors``.

    Only of tuples: a list or a mapping may be one that the module writes into.
    """
    if isinstance(value, torch.Tensor):
        for index, tensor in enumerate(tensors):
            if tensor is value:  # modules ask whether query and key are one
                return _Place(index)
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if type(value) is tuple:
        return tuple([_taken(item, tensors) for item in value])
    return value


def _put(value: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.index]
    if type(value) is tuple:
        return tuple([_put(item, tensors) for item in value])
    return value
