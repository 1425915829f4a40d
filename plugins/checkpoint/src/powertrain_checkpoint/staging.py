"""The bytes of tensors as buffers: in place, or copied into host memory that saves share."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from powertrain.roles.accelerator import Accelerator


def in_place(tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    """Yield each contiguous tensor's bytes; one that lies on a device is copied when its turn comes."""
    for tensor in tensors:
        host = tensor.detach().cpu()
        yield _bytes(host)


class Staging:
    """One block of host memory into which each asynchronous save copies what it writes.

    It grows to the largest save and is kept from then on, page-locked where
    the accelerator can, so a save allocates nothing.
    """

    def __init__(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator if accelerator and "pinned" in accelerator.capabilities else None
        self._block = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[memoryview]:
        """Copy the tensors, in order; return their bytes, valid until the next call.

        Element sizes must not increase from one tensor to the next, which keeps each aligned.
        """
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if total > self._block.numel():
            self._block = torch.empty(total, dtype=torch.uint8)
            if self._accelerator is not None:
                self._block = self._accelerator.pin(self._block)
        views, end = [], 0
        for tensor in tensors:
            start, end = end, end + tensor.numel() * tensor.element_size()
            place = self._block[start:end]
            place.view(tensor.dtype).view(tensor.shape).copy_(
                tensor.detach(), non_blocking=self._accelerator is not None
            )
            views.append(_bytes(place))
        if self._accelerator is not None:
            for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
                self._accelerator.synchronize(device)
        return views


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous host tensor's memory, which the view keeps alive."""
    array = (ctypes.c_ubyte * (math.prod(tensor.shape) * tensor.element_size())).from_address(tensor.data_ptr())
    array._keep = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
