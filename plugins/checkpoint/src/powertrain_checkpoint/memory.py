"""The bytes of tensors: as buffers, and copied with their checksum in one go."""

from __future__ import annotations

import ctypes
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence

import torch

_STEP = 2**20
"""Bytes copied and then checked at a time: the second look finds them in the processor's cache."""


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous host tensor's memory, which the view keeps alive."""
    array = (ctypes.c_ubyte * (math.prod(tensor.shape) * tensor.element_size())).from_address(tensor.data_ptr())
    array._keep = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def in_place(tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    """Yield each contiguous tensor's bytes; one that lies on a device is copied when its turn comes."""
    for tensor in tensors:
        yield bytes_of(tensor.detach().cpu())


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor's bytes (uint8, flat), where they lie."""
    return tensor.detach().view(-1).view(torch.uint8)


def copy_checked(source: torch.Tensor, targets: Sequence[memoryview]) -> int:
    """Copy bytes (uint8, flat) into ``targets``, one after the other, and return their CRC-32.

    Python's lock is free nearly all the time, and none of torch's threads is used: several such copies run
    beside one another, and beside training.
    """
    checksum, taken = 0, 0
    for target in targets:
        if source.device.type != "cpu":
            torch.frombuffer(target, dtype=torch.uint8).copy_(source[taken : taken + len(target)])
        for start in range(0, len(target), _STEP):
            piece = target[start : start + _STEP]
            if source.device.type == "cpu":
                move(source.data_ptr() + taken + start, piece)
            checksum = zlib.crc32(piece, checksum)
        taken += len(target)
    return checksum


def move(address: int, target: memoryview) -> None:
    """Fill ``target`` from an address, without Python's lock."""
    ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(target)), address, len(target))


def address_of(view: memoryview) -> int:
    """Return where writable memory starts."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
