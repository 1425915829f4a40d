"""What each Triton kernel moves in a second, beside a copy within the device and torch.compile of its reference.

Run: python benchmarks/gpu.py [--elements 67108864] [--rounds 20] [--only adam swiglu] [--json]
Bars: Adam at least 0.85 of the copy's bandwidth; every kernel at least 1.0 of torch.compile. In each round the copy,
the kernel and the compiled reference take turns; ratios are of the medians. Needs a GPU: exit code 2 without one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch

from powertrain import kernels
from powertrain.kernels.updates import Operands

Work = Callable[[Callable[..., Any]], Any]
BF16 = torch.bfloat16


@attrs.frozen
class Case:
    """One kernel on one set of tensors.

    Attributes:
        name: the kernel's.
        label: what is printed.
        moved: bytes read and written, at the least.
        work: calls a function with the kernel's arguments.
    """

    name: str
    label: str
    moved: int
    work: Work


def updates(elements: int, device: torch.device) -> Iterator[Case]:
    """Yield the optimizers: 64 tensors with fp32 masters and state, bf16 gradients, and a bf16 copy."""
    pieces = 64
    sizes = [elements // pieces] * pieces

    def row(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.rand(size, device=device).to(dtype) for size in sizes]

    f32 = torch.float32
    full = Operands(row(f32), row(BF16), row(f32), row(f32), row(BF16))
    one = attrs.evolve(full, seconds=())
    step = {"step": 10, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
    scale = torch.tensor(0.5, device=device)
    adam = {**step, "lr": 1e-4, "decoupled": True, "scale": scale}
    yield Case("adam", "adam", elements * (12 + 2 + 12 + 2), lambda f: f(full, **adam))
    lion = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.01, "scale": scale}
    yield Case("lion", "lion", elements * (8 + 2 + 8 + 2), lambda f: f(one, **lion))
    adagrad = {"step": 10, "lr": 1e-4, "lr_decay": 0.0, "eps": 1e-8, "weight_decay": 0.01, "scale": scale}
    yield Case("adagrad", "adagrad", elements * (8 + 2 + 8 + 2), lambda f: f(one, **adagrad))
    sgd = {"lr": 1e-4, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 0.01, "first_time": False}
    yield Case("momentum", "momentum", elements * (8 + 2 + 8 + 2), lambda f: f(one, **sgd, scale=scale))
    bare = attrs.evolve(full, outs=())
    yield Case("lamb_moments", "lamb_moments", elements * (12 + 2 + 8), lambda f: f(bare, **step, scale=scale))
    rates = torch.full((pieces,), 1e-6, device=device)
    yield Case("lamb_apply", "lamb_apply", elements * (12 + 4 + 2), lambda f: f(full, rates=rates, **step))
    yield Case("sums_of_squares", "sums_of_squares", elements * 2, lambda f: f(full.grads))


def flat(elements: int, device: torch.device) -> Iterator[Case]:
    """Yield what works on single tensors."""
    terms = [torch.rand(elements, device=device).to(BF16) for _ in range(4)]
    out = torch.empty_like(terms[0])
    yield Case("combine", "combine 4", elements * 10, lambda f: f(out, terms))
    for bits in (8, 4):
        data = torch.zeros(elements * bits // 8, dtype=torch.uint8, device=device)
        scales = torch.ones(elements // 256, device=device)
        moved = elements * 2 + data.numel() + scales.numel() * 4
        width = {"bits": bits, "block": 256}
        quantize: Work = lambda f, d=data, s=scales, w=width: f(terms[0], d, s, **w)  # noqa: E731
        dequantize: Work = lambda f, d=data, s=scales, w=width: f(d, s, out, **w)  # noqa: E731
        yield Case("quantize", f"quantize int{bits}", moved, quantize)
        yield Case("dequantize", f"dequantize int{bits}", moved, dequantize)


def layers(elements: int, device: torch.device) -> Iterator[Case]:
    """Yield the layers in bf16, forward and backward together."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(BF16).requires_grad_()

    def both(*leaves: torch.Tensor) -> Callable[[Any], None]:
        def run(found: Any) -> None:
            found = found if isinstance(found, tuple) else (found,)
            torch.autograd.grad(found, leaves, [one.detach() if one.ndim else None for one in found])

        return run

    dim = 4096
    tokens = elements // dim
    x, weight, bias = leaf(tokens, dim), leaf(dim), leaf(dim)
    rms, layer = both(x, weight), both(x, weight, bias)
    yield Case("rms_norm", "rms_norm", elements * 10, lambda f: rms(f(x, weight, 1e-5)))
    yield Case("layer_norm", "layer_norm", elements * 10, lambda f: layer(f(x, weight, bias, 1e-5)))
    q, k = leaf(1, tokens, 32, 128), leaf(1, tokens, 8, 128)
    heads = (q.transpose(1, 2), k.transpose(1, 2))
    angles = torch.randn(2, tokens, 128, device=device)
    turned = both(q, k)
    yield Case("rotary", "rotary 32+8 heads", elements * 10, lambda f: turned(f(*heads, *angles)))
    gate, up = leaf(tokens, dim), leaf(tokens, dim)
    gated = both(gate, up)
    yield Case("swiglu", "swiglu", elements * 16, lambda f: gated(f(gate, up)))
    width = 32768
    rows = elements // width
    logits, targets = torch.randn(rows, width, device=device).to(BF16), torch.arange(rows, device=device) % width
    yield Case("softmax_cross_entropy", "softmax_cross_entropy", rows * width * 4, lambda f: f(logits, targets, 1.0))
    few = 4096
    hidden, head = leaf(few, 1024), leaf(width, 1024)
    wanted = torch.arange(few, device=device)
    lost = both(hidden, head)
    yield Case("cross_entropy", "cross_entropy 4096 by 32768", few * width * 4, lambda f: lost(f(hidden, head, wanted)))


def seconds(work: Callable[[], Any], calls: int = 5) -> float:
    """Return how long the device takes for a call, by its own clock; from the second on the host has run ahead."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def measure(
    case: Case, copy: Callable[[], Any], copied: int, rounds: int, kernel: Callable[..., Any]
) -> dict[str, Any]:
    """Return one line of the table."""
    compiled = torch.compile(kernels.reference(case.name), dynamic=False)
    contenders = [copy, lambda: case.work(kernel), lambda: case.work(compiled)]
    for contender in contenders:
        for _ in range(3):
            contender()
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, found in zip(contenders, times, strict=True):
            found.append(seconds(contender))
    by_copy, own, theirs = (statistics.median(found) for found in times)
    speed, bandwidth = case.moved / own / 1e9, copied / by_copy / 1e9
    return {
        "kernel": case.label,
        "bytes": case.moved,
        "milliseconds": own * 1e3,
        "GB/s": speed,
        "of copy": speed / bandwidth,
        "of compile": theirs / own,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 26, help="of each list or tensor; a multiple of 2**18")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=list(kernels.NAMES), help="names of kernels")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.device_count():
        print("benchmarks/gpu.py needs a GPU, and torch sees none: there is nothing to measure here", file=sys.stderr)
        return 2
    from powertrain_triton.offer import Offer

    device, offer = torch.device("cuda", 0), Offer()
    torch.cuda.set_device(device)
    source = torch.empty(arguments.elements, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    bandwidth = copied / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(30)) / 1e9
    name = torch.cuda.get_device_properties(device).name
    lines = []
    for family in (flat, layers, updates):
        for case in family(arguments.elements, device):
            kernel = offer.get(case.name)
            if case.name not in arguments.only or kernel is None:
                continue
            torch.compiler.reset()
            lines.append(measure(case, lambda: target.copy_(source), copied, arguments.rounds, kernel))
            if not arguments.json:
                if len(lines) == 1:
                    print(f"{name}, torch {torch.__version__}: a copy moves {bandwidth:.0f} GB/s")
                    print(f"{'kernel':28} {'ms':>9} {'GB/s':>8} {'of copy':>8} {'of compile':>11}")
                line = lines[-1]
                print(
                    f"{line['kernel']:28} {line['milliseconds']:9.3f} {line['GB/s']:8.0f} {line['of copy']:8.2f} "
                    f"{line['of compile']:11.2f}",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps({"device": name, "torch": torch.__version__, "copy GB/s": bandwidth, "kernels": lines}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
