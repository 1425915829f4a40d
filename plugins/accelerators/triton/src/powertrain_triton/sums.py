"""Sums: of squares, and of several arrays into one; see ``powertrain.kernels.sums``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from powertrain import kernels
from powertrain.kernels.sums import NARROW
from powertrain.roles.communicator import Reduction
from powertrain_triton.device import sums
from powertrain_triton.table import BLOCK, FORMATS, UPDATED, Tables, ready, there
from powertrain_triton.updates import gathered

MOST_TERMS = 64
"""Terms that one kernel combines: its code is as long as they are many."""


class Kernels:
    """The sums.

    Args:
        tables: that other kernels may share.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def sums_of_squares(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of the squares of each tensor's elements: (tensors,) in fp32, added up in fp64."""
        kinds = list(dict.fromkeys(tensor.dtype for tensor in tensors))
        if not tensors or not set(kinds) <= set(UPDATED):
            return torch.as_tensor(kernels.reference("sums_of_squares")(tensors))
        if len(kinds) == 1:
            return self._of_one_kind(tensors)
        result = torch.empty(len(tensors), device=tensors[0].device)
        for kind in kinds:
            chosen = [index for index, tensor in enumerate(tensors) if tensor.dtype == kind]
            found = self._of_one_kind([tensors[index] for index in chosen])
            result.index_copy_(0, there(chosen, result.device), found)
        return result

    def _of_one_kind(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        table = self._tables.of([tensors])
        partial = torch.empty(table.programs, dtype=torch.float64, device=table.device)
        if table.programs:
            with ready(table.device):
                sums.squares[(table.programs,)](
                    table.rows, table.blocks, partial, DTYPE=FORMATS[tensors[0].dtype], BLOCK=BLOCK
                )
        return gathered(table, partial, 1).view(-1)

    def combine(self, output: torch.Tensor, terms: Sequence[torch.Tensor], reduction: Reduction = "sum") -> None:
        """Combine ``terms`` in their order, from the first to the last, into ``output``, which may be one of them."""
        whole = not output.dtype.is_floating_point
        if output.dtype not in FORMATS or (whole and reduction == "mean") or len(terms) > MOST_TERMS:
            kernels.reference("combine")(output, terms, reduction)
            return
        arrays = [output, *terms]
        kinds = {(array.dtype, array.numel(), array.device, array.is_contiguous()) for array in arrays}
        if len(kinds) > 1 or not output.is_contiguous():
            raise ValueError(f"what is combined differs in type, length or device, or is not contiguous: {kinds}")
        if not output.numel():
            return
        places = [array.data_ptr() for array in arrays]
        narrow = output.dtype in NARROW
        wide = torch.float32 if narrow or whole else output.dtype
        with ready(output.device):
            sums.combine[(-(-output.numel() // BLOCK),)](
                there(places, output.device),
                output.numel(),
                torch.full((), len(terms), dtype=wide, device=output.device),
                DTYPE=FORMATS[output.dtype],
                TERMS=len(terms),
                HOW=reduction,
                NARROW=narrow,
                ALIGNED=not any(place % 16 for place in places),
                BLOCK=BLOCK,
            )
