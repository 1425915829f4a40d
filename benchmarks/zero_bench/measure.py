"""What a process holds: the same two functions for every contender."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from zero_bench.compat import plain_dispatch


def live_bytes() -> int:
    """Return the bytes behind all tensors of this process, each byte once.

    Finds tensors through the garbage collector and through ``.grad``. Counted
    are the address ranges of their storages, so that views, shared storages and
    slices of one mapping are not counted twice; freed storages (of size zero)
    count nothing. Memory that only C++ holds is not seen.
    """
    gc.collect()
    ranges: set[tuple[int, int]] = set()
    for found in gc.get_objects():
        if not issubclass(type(found), torch.Tensor):  # isinstance would wake lazy proxies
            continue
        for tensor in (found, found.grad if found.is_leaf else None):
            if tensor is None:
                continue
            local = tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor
            with plain_dispatch():
                if local.device.type == "cpu" and local.layout == torch.strided:
                    storage = local.untyped_storage()
                    ranges.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    total, reached = 0, 0
    for begin, end in sorted(ranges):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def peak_rss() -> int:
    """Return the most bytes that were resident since the process began (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux only")
