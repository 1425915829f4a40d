"""One process of benchmarks/cpu_kernels.py: reads what to time and on how many threads, and answers with seconds."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

warnings.simplefilter("ignore")
Action = Callable[[], Any]
CLIP = 0.999
PAUSE = 0.02
"""Seconds before each update: OpenMP's threads, which torch computes with, go on spinning for a while after their work,
and would take a core from whatever comes next."""

RATES: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def answer(text: str) -> None:
    print(f"= {text}", flush=True)


def ours(parameters: int) -> dict[str, Action]:
    """Return the actions on one set of tensors: our kernel, torch's fused optimizer, and the floor."""
    from powertrain import native
    from powertrain.kernels.updates import Operands
    from powertrain_cpu.kernels import CpuKernels
    from powertrain_cpu.source import SOURCE

    kernels = CpuKernels(native.load(SOURCE))
    value = torch.randn(parameters).requires_grad_()
    grad, first = torch.randn(parameters), torch.zeros(parameters)
    second, narrow = torch.zeros(parameters), torch.zeros(parameters, dtype=torch.bfloat16)
    value.grad = grad
    optimizer = torch.optim.AdamW([value], fused=True, **RATES)
    optimizer.state[value] = {"step": torch.tensor(1.0), "exp_avg": first, "exp_avg_sq": second}
    data = value.detach()
    beta1, beta2 = RATES["betas"]
    numbers = {"step": 9, "beta1": beta1, "beta2": beta2, "decoupled": True}
    numbers |= {name: RATES[name] for name in ("lr", "eps", "weight_decay")}
    plain = Operands([data], [grad], [first], [second])
    both = Operands([data], [grad], [first], [second], [narrow])

    def floor() -> None:
        data.add_(grad, alpha=1e-9)
        first.add_(1e-9)
        second.add_(1e-9)

    def passes() -> None:
        grad.mul_(CLIP)
        optimizer.step()
        narrow.copy_(data)

    return {
        "floor": floor,
        "ours": lambda: kernels.adam(plain, **numbers),
        "torch": optimizer.step,
        "ours:fused": lambda: kernels.adam(both, scale=CLIP, **numbers),
        "torch:passes": passes,
    }


def deepspeed(parameters: int) -> dict[str, Action]:
    """Return the peer's update; its C++ is built when it is first made."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    value = torch.randn(parameters).requires_grad_()
    value.grad = grad = torch.randn(parameters)
    data, narrow = value.detach(), torch.zeros(parameters, dtype=torch.bfloat16)
    optimizer = DeepSpeedCPUAdam([value], adamw_mode=True, **RATES)

    def passes() -> None:
        grad.mul_(CLIP)
        optimizer.step()
        narrow.copy_(data)

    return {"deepspeed": optimizer.step, "deepspeed:passes": passes}


def main(kind: str, parameters: int) -> None:
    actions = {"ours": ours, "deepspeed": deepspeed}[kind](parameters)
    answer("ready")
    for line in sys.stdin:
        what, threads = line.split()
        torch.set_num_threads(int(threads))
        time.sleep(PAUSE)
        started = time.perf_counter()
        actions[what]()
        answer(str(time.perf_counter() - started))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
