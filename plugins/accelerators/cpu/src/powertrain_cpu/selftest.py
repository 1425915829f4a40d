"""Random cases of every kernel, against a float64 computation and against the PyTorch reference.

A kernel may be twice as far from the float64 result as the fp32 reference is,
and one unit in the last place more; the quantizers must give the same bytes.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import attrs
import torch

from powertrain import kernels, native
from powertrain.kernels.updates import Operands
from powertrain.native import Finding
from powertrain.roles.communicator import Reduction
from powertrain_cpu.kernels import PATHS, CpuKernels
from powertrain_cpu.source import KERNELS, SOURCE

CASES = 40
"""Of each kernel and path, when a user asks."""

SIZES = (1, 2, 7, 15, 16, 17, 63, 100, 1000, 1024, 1025, 3000)
"""Elements; blocks of the kernels have 1,024."""

SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-42, 3e38, -3e38, 1e-20, 6e4, 1e-7)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OVERFLOWN = 1e3
"""Units in the last place from which the reference itself is taken to have left the range of fp32 on the way."""


def check(cases: int = CASES) -> Iterator[Finding]:
    """Build the kernels where they are not, and try each on every path of this processor."""
    module = native.load(SOURCE)
    for path in PATHS[: module.widest_path() + 1]:
        own = CpuKernels(module, path)
        for name in KERNELS:
            yield Finding(name, path, cases, worst_of(own, name, range(cases)))


@attrs.define
class Pool:
    """The largest errors of single figures over many cases, in units in the last place.

    One figure alone proves nothing: the reference may have been lucky with it.
    """

    ours: float = 0.0
    theirs: float = 0.0


def worst_of(own: CpuKernels, name: str, seeds: Iterable[int]) -> float:
    """Return the largest error of a kernel over many random cases, in units of what is allowed."""
    pool = Pool()
    worst = max(error_of(own, name, seed, pool) for seed in seeds)
    return max(worst, pool.ours / (2 * pool.theirs + 1))


def error_of(own: CpuKernels, name: str, seed: int, pool: Pool) -> float:
    """Return the error of one random case, in units of what is allowed; single figures go into ``pool``."""
    draw = random.Random(f"{name} {seed}")
    torch_generator = torch.Generator().manual_seed(draw.getrandbits(60))
    if name in UPDATES:
        return _update(own, name, draw, torch_generator, pool)
    return {"sums_of_squares": _sums, "combine": _combine, "quantize": _quantize, "dequantize": _quantize}[name](
        own, draw, torch_generator
    )


# --- drawing ---------------------------------------------------------------------------


def _values(count: int, dtype: torch.dtype, draw: random.Random, generator: torch.Generator) -> torch.Tensor:
    """Return random numbers at a random alignment, some of them odd ones."""
    room = torch.empty(count + 16, dtype=dtype)
    start = draw.choice((0, 0, 1, 3, 8))
    values = room[start : start + count]
    size = draw.choice((1e-6, 1e-3, 1.0, 1.0, 30.0))
    values.copy_(torch.randn(count, generator=generator) * size)
    if draw.random() < 0.3:
        for _ in range(max(1, count // 50)):
            values[draw.randrange(count)] = draw.choice(SPECIAL)
    return values


def _copy(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    start = draw.choice((0, 1, 5))
    return room[start : start + tensor.numel()].copy_(tensor)


# --- errors ----------------------------------------------------------------------------


def _ulp(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance between neighbouring numbers of a type at a magnitude, in float64."""
    digits, least = {torch.float32: (23, -149), torch.bfloat16: (7, -133), torch.float16: (10, -24)}[dtype]
    exponent = torch.frexp(scale.abs().clamp(min=1e-300)).exponent.double() - 1
    return torch.exp2((exponent - digits).clamp(min=least))


def _size(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().abs().nan_to_num(0.0, 3e38, 3e38)


def compare(
    found: torch.Tensor,
    reference: torch.Tensor,
    truth: torch.Tensor,
    scale: torch.Tensor,
    doubtful: torch.Tensor | None = None,
) -> float:
    """Return the error of ``found`` in units of what is allowed: one case.

    Args:
        found: what the kernel gave.
        reference: what the reference gave, in the same type.
        truth: the same in float64.
        scale: magnitudes whose roundings go into the result, float64: at least that of the result.
        doubtful: elements that are not compared.
    """
    one = _ulp(torch.maximum(scale, _size(truth)), found.dtype)
    theirs = ((reference.double() - truth).abs() / one).nan_to_num(nan=float("inf"))
    ours = ((found.double() - truth).abs() / one).nan_to_num(nan=float("inf"))
    sound = reference.isfinite() & truth.isfinite() & (theirs < OVERFLOWN)
    # Where the reference left the range of fp32, the kernel must have left it the same way.
    if doubtful is not None:
        found, reference = found.masked_fill(doubtful, 0.0), reference.masked_fill(doubtful, 0.0)
        sound = sound & ~doubtful
    odd = ~sound
    same = (found == reference) | (found.isnan() & reference.isnan())
    near = (found.double() - reference.double()).abs() <= 1e-3 * reference.double().abs() + 4 * one
    if not bool((same | near)[odd].all()):
        return float("inf")
    if not bool(sound.any()):
        return 0.0
    return float(ours[sound].max() / (2 * theirs[sound].max() + 1))


# --- updates ---------------------------------------------------------------------------

Numbers = dict[str, Any]


@attrs.frozen
class Update:
    """How an update is drawn: its numbers, and which state it has."""

    draw: Callable[[random.Random], Numbers]
    state: int


def _betas(draw: random.Random) -> Numbers:
    return {"beta1": draw.choice((0.9, 0.0, 0.95)), "beta2": draw.choice((0.999, 0.95))}


def _adam(draw: random.Random) -> Numbers:
    return {
        **_betas(draw),
        "step": draw.choice((1, 2, 10, 5000)),
        "lr": draw.choice((1e-3, 0.1)),
        "eps": draw.choice((1e-8, 1e-3)),
        "weight_decay": draw.choice((0.0, 0.1)),
        "decoupled": draw.random() < 0.5,
    }


def _lion(draw: random.Random) -> Numbers:
    return {**_betas(draw), "lr": draw.choice((1e-4, 0.1)), "weight_decay": draw.choice((0.0, 0.1))}


def _adagrad(draw: random.Random) -> Numbers:
    numbers = {"step": draw.choice((1, 7, 900)), "lr": 0.01, "lr_decay": draw.choice((0.0, 1e-3)), "eps": 1e-10}
    return {**numbers, "weight_decay": draw.choice((0.0, 0.1))}


def _momentum(draw: random.Random) -> Numbers:
    return {
        "lr": 0.1,
        "momentum": draw.choice((0.9, 0.0)),
        "dampening": draw.choice((0.0, 0.5)),
        "nesterov": draw.random() < 0.5,
        "weight_decay": draw.choice((0.0, 0.1)),
        "first_time": draw.random() < 0.3,
    }


def _lamb(draw: random.Random) -> Numbers:
    return {**_betas(draw), "step": draw.choice((1, 9)), "eps": 1e-6, "weight_decay": draw.choice((0.0, 0.1))}


UPDATES = {
    "adam": Update(_adam, 2),
    "lion": Update(_lion, 1),
    "adagrad": Update(_adagrad, 1),
    "momentum": Update(_momentum, 1),
    "lamb_moments": Update(_lamb, 2),
    "lamb_apply": Update(_lamb, 2),
}


def _update(own: CpuKernels, name: str, draw: random.Random, generator: torch.Generator, pool: Pool) -> float:
    rule = UPDATES[name]
    kinds = (draw.choice(FLOATS), draw.choice(FLOATS), draw.choice((torch.float32, torch.bfloat16)))
    counts = [draw.choice(SIZES) for _ in range(draw.choice((1, 1, 3)))]
    params = [_values(count, kinds[0], draw, generator) for count in counts]
    grads = [_values(count, kinds[1], draw, generator) for count in counts]
    firsts = [_values(count, kinds[2], draw, generator) for count in counts]
    if name == "adagrad":
        firsts = [first.abs_() for first in firsts]
    seconds = [_values(count, kinds[2], draw, generator).square_() for count in counts] if rule.state > 1 else []
    if name == "momentum" and draw.random() < 0.2:
        firsts = []
    out = draw.choice((None, torch.bfloat16, torch.float16)) if name != "lamb_moments" else None
    numbers = rule.draw(draw)
    scale = draw.choice((1.0, 0.37, 2.0**-16))
    if name == "lamb_apply":
        numbers["rates"] = torch.rand(len(counts), generator=generator)
    else:
        numbers["scale"] = scale

    def operands(copy: Callable[[torch.Tensor], torch.Tensor], wide: bool) -> Operands:
        outs = [torch.zeros(count, dtype=torch.float64 if wide else out) for count in counts] if out else []
        given = {"params": params, "grads": grads, "firsts": firsts, "seconds": seconds}
        return Operands(**{part: [copy(tensor) for tensor in tensors] for part, tensors in given.items()}, outs=outs)

    function = kernels.reference(name)
    ours, theirs = operands(lambda t: _copy(t, draw), False), operands(torch.clone, False)
    true = operands(torch.Tensor.double, True)
    sums = getattr(own, name)(ours, **numbers), function(theirs, **numbers), function(true, **numbers)
    worst = 0.0
    parts = zip(params, grads, firsts or params, strict=True)
    scales = [_size(p) + scale * _size(g) + _size(m) for p, g, m in parts]
    doubts = [_no_sign(g, m, numbers) if name == "lion" else None for g, m in zip(grads, firsts or grads, strict=True)]
    for part in ("params", "firsts", "seconds", "outs"):
        tensors = zip(getattr(ours, part), getattr(theirs, part), getattr(true, part), scales, doubts, strict=False)
        for found, reference, truth, around, doubt in tensors:
            one = torch.zeros(1) if part == "seconds" else around
            worst = max(worst, compare(found, reference, truth, one, doubt if part in ("params", "outs") else None))
    for found, given in zip(ours.grads, grads, strict=True):
        if not torch.equal(found.nan_to_num(1.5), given.nan_to_num(1.5)):
            return float("inf")  # it wrote where it should only read
    if sums[0] is not None:
        truth = sums[2].double()
        sound = truth.isfinite() & sums[1].isfinite() & (truth < 1e38)
        one = _ulp(truth, torch.float32)
        for found, errors in (("ours", sums[0]), ("theirs", sums[1])):
            largest = float(((errors.double() - truth).abs() / one)[sound].max()) if bool(sound.any()) else 0.0
            setattr(pool, found, max(getattr(pool, found), largest))
    return worst


def _no_sign(grad: torch.Tensor, first: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """Return where the two terms whose sum's sign is Lion's step cancel: rounding decides which way it goes."""
    terms = first.double() * numbers["beta1"], grad.double() * numbers["scale"] * (1 - numbers["beta1"])
    cancelled: torch.Tensor = (terms[0] + terms[1]).abs() <= 1e-6 * (terms[0].abs() + terms[1].abs())
    return cancelled


# --- sums ------------------------------------------------------------------------------


def _sums(own: CpuKernels, draw: random.Random, generator: torch.Generator) -> float:
    dtype = draw.choice(FLOATS)
    tensors = [_values(draw.choice((*SIZES, 70_000)), dtype, draw, generator) for _ in range(draw.choice((1, 4)))]
    truth = torch.stack([tensor.double().square().sum() for tensor in tensors])
    found, reference = own.sums_of_squares(tensors), torch.stack([tensor.float().square().sum() for tensor in tensors])
    return compare(found, reference, truth, torch.zeros(1))


def _combine(own: CpuKernels, draw: random.Random, generator: torch.Generator) -> float:
    dtype, count, ways = draw.choice(FLOATS), draw.choice(SIZES), draw.choice((2, 3, 5))
    how: Reduction = draw.choice(get_args(Reduction))
    terms = [_values(count, dtype, draw, generator) for _ in range(ways)]
    reference = torch.empty(count, dtype=dtype)
    kernels.reference("combine")(reference, terms, how)
    found = draw.choice((torch.empty(count, dtype=dtype), terms[draw.randrange(ways)]))
    own.combine(found, terms, how)
    same = (found == reference) | (found.isnan() & reference.isnan())
    return 0.0 if bool(same.all()) else float("inf")  # the order is fixed, so every bit is


def _quantize(own: CpuKernels, draw: random.Random, generator: torch.Generator) -> float:
    dtype, block, bits = draw.choice(FLOATS), draw.choice((8, 64, 256, 1024)), draw.choice((8, 4))
    count = block * draw.choice((1, 3, 40))
    values = _values(count, dtype, draw, generator)
    results: dict[str, list[torch.Tensor]] = defaultdict(list)
    start = _values(count, dtype, draw, generator)
    for quantize, dequantize in (
        (own.quantize, own.dequantize),
        (kernels.reference("quantize"), kernels.reference("dequantize")),
    ):
        data, scales = torch.zeros(count * bits // 8, dtype=torch.uint8), torch.zeros(count // block)
        quantize(values, data, scales, bits=bits, block=block)
        plain, added = torch.empty(count, dtype=dtype), start.clone()
        dequantize(data, scales, plain, bits=bits, block=block)
        dequantize(data, scales, added, bits=bits, block=block, add=True)
        for name, tensor in (("data", data), ("scales", scales), ("plain", plain), ("added", added)):
            results[name].append(tensor)
    return 0.0 if all(_same_bits(pair) for pair in results.values()) else float("inf")


def _same_bits(pair: Sequence[torch.Tensor]) -> bool:
    first, second = pair
    nan = first.isnan() & second.isnan() if first.is_floating_point() else torch.zeros(1, dtype=torch.bool)
    return bool(((first == second) | nan).all())
