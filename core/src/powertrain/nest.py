"""Batches: nests of tuples, lists and mappings with tensors at the leaves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from powertrain.errors import BatchError


def leaves(nest: Any) -> Iterator[Any]:
    """Yield what a nest holds, in order."""
    if isinstance(nest, Mapping):
        for value in nest.values():
            yield from leaves(value)
    elif isinstance(nest, (tuple, list)):
        for value in nest:
            yield from leaves(value)
    else:
        yield nest


def tensors(nest: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a nest, also those in the fields of dataclasses."""
    for leaf in leaves(nest):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from tensors(getattr(leaf, field.name, None))


def map_tensors(function: Callable[[torch.Tensor], Any], nest: Any) -> Any:
    """Return the same nest with ``function`` applied to each tensor."""
    if isinstance(nest, torch.Tensor):
        return function(nest)
    if isinstance(nest, Mapping):
        # A shallow copy keeps subclasses such as the output classes of model libraries.
        result: Any = copy.copy(nest)
        for key, value in nest.items():
            result[key] = map_tensors(function, value)
        return result
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(map_tensors(function, value) for value in nest))
    if isinstance(nest, (tuple, list)):
        return type(nest)(map_tensors(function, value) for value in nest)
    return nest


def samples(batch: Any) -> int:
    """Return how many samples a batch has: the size of dimension 0 of its tensors.

    Raises:
        BatchError: it has no tensor, its tensors differ in dimension 0, or they are empty.
    """
    sizes = {leaf.shape[0] for leaf in leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim > 0}
    if not sizes:
        raise BatchError(
            "the batch holds no tensor with a dimension to split",
            expected="a tensor, or tuples, lists and dicts of tensors",
            found=type(batch).__name__,
        )
    if len(sizes) > 1:
        raise BatchError(
            "the batch's tensors differ in their number of samples",
            expected="the same size of dimension 0 everywhere",
            found=", ".join(str(size) for size in sorted(sizes)),
        )
    if sizes == {0}:
        raise BatchError("the batch is empty", expected="at least one sample", found="0 samples")
    return sizes.pop()


def split(batch: Any, size: int) -> Iterator[Any]:
    """Yield pieces of ``size`` samples along dimension 0; the last may be smaller."""
    total = samples(batch)
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield map_tensors(lambda t, a=start, b=stop: t[a:b] if t.ndim > 0 else t, batch)  # type: ignore[misc]


def place(batch: Any, device: torch.device, floating: torch.dtype | None) -> Any:
    """Return ``batch`` on ``device``, floating-point tensors converted to ``floating`` if given."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        dtype = floating if floating is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=device, dtype=dtype, non_blocking=True)

    return map_tensors(move, batch)
