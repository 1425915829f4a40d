"""Compiles every kernel for a GPU that need not be there, and prints what its machine code moves at a time.

Run by ``test_compile.py`` in a process of its own, in which nothing is launched: ``compiled.py cuda 90 32``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from powertrain.kernels.updates import Operands
from powertrain_triton import table
from powertrain_triton.offer import NAMES, homes

STEP = {"step": 3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


class Absent:
    """Stands in for the driver of the device that is compiled for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def anywhere(device: torch.device) -> Iterator[None]:
    """Take tensors in the host's memory: their contents are never read."""
    yield


def record(kernels: dict[str, list[str]]) -> None:
    """Let a launch compile, and leave the assembly."""
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assembly = kernel.asm.get("ptx") or kernel.asm.get("amdgcn")
        module = self.fn.__module__.rpartition(".")[2]
        kernels.setdefault(f"{module}.{self.fn.__name__}", []).append(assembly)
        return kernel

    triton.JITFunction.run = compile_only


def update(kernels: dict[str, Any], dtype: torch.dtype) -> None:
    """Launch all updates: fp32 masters with gradients and a copy in ``dtype``, or everything in it."""

    def row(kind: torch.dtype) -> list[torch.Tensor]:
        return [torch.zeros(4096, dtype=kind)]

    master = torch.float32 if dtype == torch.bfloat16 else dtype
    lists = {"params": row(master), "grads": row(dtype), "firsts": row(master), "seconds": row(master)}
    full, one = Operands(**lists, outs=row(dtype)), Operands(lists["params"], lists["grads"], lists["firsts"])
    kernels["adam"](full, **STEP, lr=0.1, decoupled=True)
    kernels["lamb_moments"](Operands(**lists), **STEP)
    kernels["lamb_apply"](full, rates=torch.ones(1), **STEP)
    kernels["lion"](one, lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.1)
    kernels["adagrad"](one, step=1, lr=0.1, lr_decay=0.1, eps=1e-8, weight_decay=0.1)
    rest = {"momentum": 0.9, "dampening": 0.1, "nesterov": True, "weight_decay": 0.1, "first_time": False}
    kernels["momentum"](one, lr=0.1, **rest)


def others(kernels: dict[str, Any], dtype: torch.dtype) -> None:
    """Launch everything else in one type."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    flat = zeros(4096).detach()
    kernels["sums_of_squares"]([flat])
    for how in ("sum", "mean", "max"):
        kernels["combine"](flat, [flat] * 3, how)
    for bits in (8, 4):
        data, scales = torch.zeros(512 * bits, dtype=torch.uint8), torch.zeros(16)
        kernels["quantize"](flat, data, scales, bits=bits, block=256)
        kernels["dequantize"](data, scales, flat, bits=bits, block=256, add=True)
    kernels["rms_norm"](zeros(64, 4096), zeros(4096), 1e-5).sum().backward()
    kernels["layer_norm"](zeros(64, 768), zeros(768), zeros(768), 1e-5).sum().backward()
    q, k = kernels["rotary"](zeros(2, 32, 16, 128), zeros(2, 8, 16, 128), torch.zeros(16, 128), torch.zeros(16, 128))
    (q.sum() + k.sum()).backward()
    kernels["swiglu"](zeros(4096), zeros(4096)).sum().backward()
    kernels["cross_entropy"](zeros(64, 32), zeros(8192, 32), torch.zeros(64, dtype=torch.int64)).backward()


def main() -> None:
    """Print a JSON object: for each kernel how many wide accesses and fused products each compilation has."""
    kind, architecture, warp = sys.argv[1:]
    number = int(architecture) if architecture.isdigit() else architecture
    driver.set_active(Absent(GPUTarget(kind, number, int(warp))))
    found: dict[str, list[str]] = {}
    record(found)
    table.ready = anywhere  # before any other module of the library takes it
    found_in = homes()
    kernels = {name: getattr(found_in[module], name) for name, module in NAMES.items()}
    for dtype in (torch.float32, torch.bfloat16):
        update(kernels, dtype)
        others(kernels, dtype)
    # Of AMD's 256 threads each has four elements, which are 8 bytes in 16 bits.
    wide = re.compile(r"(?:ld|st)\.global\S*\.v4\.b32|(?:load|store)_(?:b64|b128|dwordx2|dwordx4)")
    fused = re.compile(r"\bfma\.rn\.f32|\bv_(?:pk_)?(?:fma|mac|fmac)_f32")
    report = {
        name: {
            "wide": [len(wide.findall(text)) for text in texts],
            "fused": [len(fused.findall(text)) for text in texts],
        }
        for name, texts in found.items()
    }
    print(json.dumps(report))


main()
