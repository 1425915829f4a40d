"""Tables of tensors: one launch for any number of them.

A table's rows are pieces of tensors, each of a whole number of blocks but for a
tensor's end, with the addresses at which they begin (the columns are in
``device.formats``). Few tensors' worth of elements have one block a row, so
that no program finds nothing to do; many have up to ``MOST`` of them, so that
the table stays below a thousandth of what is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import attrs
import torch
import triton.language as tl

from powertrain_triton.device.formats import INTERPRETED, PARAM, WIDTH

BLOCK = 1024
"""Elements of one program: eight a thread, so two accesses of 16 bytes in fp32."""

ROWS = 8192
"""Rows from which on a row has several blocks."""

MOST = 64
"""Blocks of a row."""

KEPT = 256
"""Tables that are kept."""

FORMATS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}
"""Triton's names of torch's types."""

UPDATED = (torch.float32, torch.bfloat16, torch.float16)
"""Types of parameters, gradients and state."""


@attrs.frozen
class Table:
    """What a kernel over lists of tensors is launched with.

    Attributes:
        rows: int64 on the device: the rows, then for each tensor how many rows lie before it, then their number.
        ends: the second of these parts.
        blocks: of a row.
        programs: to launch.
        tensors: how many there are.
        device: where they lie.
    """

    rows: torch.Tensor
    ends: torch.Tensor
    blocks: int
    programs: int
    tensors: int
    device: torch.device


Column = tuple[int, tuple[int, ...]]
"""One list: an element's bytes, and where each tensor begins."""


class Tables:
    """The tables of one process: one of the same places is not built again.

    Training updates the same memory step after step, and on the host a table costs as much time as a device
    needs for a hundred million elements.
    """

    def __init__(self) -> None:
        self._built = lru_cache(maxsize=KEPT)(_built)

    def of(self, lists: Sequence[Sequence[torch.Tensor]]) -> Table:
        """Return the table of lists whose entries correspond; the first has an entry for every tensor."""
        sizes = tuple(tensor.numel() for tensor in lists[0])
        device = lists[0][0].device
        columns = tuple(_column(tensors, sizes, device) for tensors in lists)
        stream = torch.get_device_module(device).current_stream(device) if device.type != "cpu" else None
        return self._built(sizes, columns, _blocks_of_a_row(sum(sizes)), device, stream)


def _built(
    sizes: tuple[int, ...], columns: tuple[Column, ...], blocks: int, device: torch.device, stream: object
) -> Table:
    # ``stream`` is in the key alone: what is copied on one stream may not have arrived for another.
    counts = torch.tensor(sizes)
    piece = blocks * BLOCK
    pieces = (counts + (piece - 1)) // piece
    ends = torch.zeros(len(sizes) + 1, dtype=torch.int64)
    torch.cumsum(pieces, 0, out=ends[1:])
    index = torch.repeat_interleave(torch.arange(len(sizes)), pieces)
    begin = (torch.arange(len(index)) - ends[index]) * piece
    host = torch.zeros(len(index) * WIDTH.value + len(ends), dtype=torch.int64, pin_memory=device.type == "cuda")
    rows = host[: len(index) * WIDTH.value].view(-1, WIDTH.value)
    torch.minimum(counts[index] - begin, torch.tensor(piece), out=rows[:, 0])
    rows[:, 2] = index
    for column, (width, addresses) in enumerate(columns, PARAM.value):
        if addresses:
            torch.add(torch.tensor(addresses)[index], begin, alpha=width, out=rows[:, column])
    rows[:, 1] = (rows[:, PARAM.value :] & 15).eq(0).all(1)
    host[len(index) * WIDTH.value :] = ends
    there = host.to(device, non_blocking=True)
    return Table(there, there[len(index) * WIDTH.value :], blocks, len(index) * blocks, len(sizes), device)


def _blocks_of_a_row(elements: int) -> int:
    blocks = 1
    while blocks < MOST and elements > ROWS * BLOCK * blocks:
        blocks *= 2
    return blocks


def _column(tensors: Sequence[torch.Tensor], sizes: tuple[int, ...], device: torch.device) -> Column:
    if not tensors:
        return 0, ()
    found = tuple(tensor.numel() for tensor in tensors)
    if found != sizes:
        raise ValueError(f"lists of one update differ in their tensors' numbers of elements: {found} and {sizes}")
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.device != device or not tensor.is_contiguous():
            raise ValueError(f"a kernel takes contiguous tensors of one device: {tensor.device} beside {device}")
        if tensor.dtype != dtype:
            raise ValueError(f"tensors of one list have one type: {tensor.dtype} beside {dtype}")
    return dtype.itemsize, tuple(tensor.data_ptr() for tensor in tensors)


def format_of(tensors: Sequence[torch.Tensor]) -> Any:
    """Return Triton's type of a list's tensors; None of an empty one."""
    if not tensors:
        return None
    if tensors[0].dtype not in UPDATED:
        raise ValueError(f"an update takes {UPDATED}, not {tensors[0].dtype}")
    return FORMATS[tensors[0].dtype]


def number(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a number as a fp32 tensor on the device; one that is there already is not waited for."""
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float32, non_blocking=True)
    return torch.full((), value, dtype=torch.float32, device=device)


def there(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return integers as a tensor on the device, without waiting for it."""
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def ready(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the one that Triton launches on, within a ``with`` block; refuse the host's memory."""
    if device.type == "cpu":
        if not INTERPRETED.value:
            raise ValueError("a Triton kernel takes tensors on a GPU, not in the host's memory")
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return context
