"""DeepSpeed's aio for io.py: reads "block depth threads", answers with the seconds of a write and of a read.

Runs under the peer's own Python.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

MADV_COLLAPSE = 25
LARGE = 2 << 20


def large(tensor: torch.Tensor) -> None:
    """Have whole large pages under a tensor, as the others have."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = -(-tensor.data_ptr() // LARGE) * LARGE
    end = (tensor.data_ptr() + tensor.numel()) // LARGE * LARGE
    if libc.madvise(start, end - start, MADV_COLLAPSE) != 0:
        print("the pinned tensor stays on small pages", file=sys.stderr)


def main() -> None:
    path, size = sys.argv[1], int(sys.argv[2])
    module = AsyncIOBuilder().load(verbose=False)
    handles: dict[str, object] = {}
    tensor = None
    print("= ready", flush=True)
    for line in sys.stdin:
        if line not in handles:
            block, depth, threads = map(int, line.split())
            handles[line] = module.aio_handle(block, depth, False, True, threads)
        handle = handles[line]
        if tensor is None:
            tensor = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))
            large(tensor)
            tensor.random_(0, 256)
        started = time.perf_counter()
        handle.sync_pwrite(tensor, path, 0)
        descriptor = os.open(path, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
        middle = time.perf_counter()
        handle.sync_pread(tensor, path, 0)
        print(f"= {middle - started} {time.perf_counter() - middle}", flush=True)


if __name__ == "__main__":
    main()
