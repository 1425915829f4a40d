"""Tensors of many parameters as a kernel takes them: flat, contiguous, of one format a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch

from powertrain.kernels.updates import Operands


@attrs.frozen(eq=False)
class Row:
    """One parameter's tensors, in any layout.

    Attributes:
        param: what is updated.
        grad: its gradient, flat or of its shape.
        first: state that goes with its elements, or None.
        second: likewise.
        out: where the new values go as well, flat or of its shape, or None.
    """

    param: torch.Tensor
    grad: torch.Tensor
    first: torch.Tensor | None
    second: torch.Tensor | None
    out: torch.Tensor | None


class _Laid:
    """A row in the order in which its parameter lies in memory, and what must be copied back."""

    def __init__(self, row: Row) -> None:
        self.copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        param = row.param
        tensors = (param, row.grad, row.first, row.second, row.out)
        if all(tensor is None or tensor.is_contiguous() for tensor in tensors):
            self.order: list[int] | None = None
        else:
            strides = param.stride()
            self.order = sorted(range(param.ndim), key=lambda dim: strides[dim], reverse=True)
        self.shape = param.shape
        self.param = self._flat(param, write=True)
        self.grad = self._flat(row.grad, write=False)
        self.first = None if row.first is None else self._flat(row.first, write=True)
        self.second = None if row.second is None else self._flat(row.second, write=True)
        self.out = None if row.out is None else self._flat(row.out, write=True)

    def _flat(self, tensor: torch.Tensor, *, write: bool) -> torch.Tensor:
        if torch.is_complex(tensor):
            tensor = torch.view_as_real(tensor)
        if self.order is None:
            return tensor
        extra = range(len(self.shape), tensor.ndim)  # real and imaginary part
        turned = tensor.view(self.shape) if tensor.ndim < len(self.shape) else tensor
        turned = turned.permute(*self.order, *extra)
        if turned.is_contiguous():
            return turned
        copy = turned.contiguous()
        if write:
            self.copied.append((turned, copy))
        return copy

    @property
    def formats(self) -> tuple[Any, ...]:
        """What the rows of one call have in common."""
        return (self.param.device, *(
            tensor if tensor is None else tensor.dtype
            for tensor in (self.param, self.grad, self.first, self.second, self.out)
        ))  # fmt: skip


def batches(rows: Sequence[Row]) -> Iterator[tuple[list[int], Operands]]:
    """Yield what can be updated in one call: the places of its rows, and their tensors.

    Parameters that are not contiguous are passed in the order of their memory; where their other tensors lie in
    another order, copies are passed, and brought back when the next one is asked for.
    """
    laid = [_Laid(row) for row in rows]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(laid):
        alike.setdefault(row.formats, []).append(place)
    for places in alike.values():
        chosen = [laid[place] for place in places]
        yield (
            places,
            Operands(
                params=[row.param for row in chosen],
                grads=[row.grad for row in chosen],
                firsts=[row.first for row in chosen if row.first is not None],
                seconds=[row.second for row in chosen if row.second is not None],
                outs=[row.out for row in chosen if row.out is not None],
            ),
        )
        for row in chosen:
            for target, copy in row.copied:
                target.copy_(copy)
