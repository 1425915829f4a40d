"""Two ranks in one process that share memory: each collective's result, bit by bit.

What ranks share is their heaps and a connection to each other's process, so two
engines of one process will do.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch

from powertrain import kernels, native
from powertrain.native import Finding
from powertrain_comm.shm.communicator import FORMATS, OPERATIONS, REDUCTIONS
from powertrain_comm.shm.peers import lanes
from powertrain_comm.shm.source import SOURCE

RANKS = 2
SIZES = (1, 65, 1025, 5000, 300_001)
ROUNDS = 12
LIMIT = 60.0
"""Seconds for one collective."""


def check(rounds: int = ROUNDS) -> Iterator[Finding]:
    """Build the module where it is not, and try every collective in random types and lengths."""
    module = native.load(SOURCE)
    engines, heaps = _connect(module)
    try:
        with ThreadPoolExecutor(RANKS) as pool:
            for operation in ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"):
                draw = random.Random(operation)
                wrong = sum(not _tried(engines, heaps, pool, operation, draw) for _ in range(rounds))
                yield Finding(operation, "2 ranks", rounds, float("inf") if wrong else 0.0)
    finally:
        for engine in engines:
            engine.close()


def _connect(module: ModuleType) -> tuple[list[Any], list[Any]]:
    """Return two engines that know each other, and their memory."""
    heaps = [module.Heap(size=1 << 30, lanes=lanes(RANKS)) for _ in range(RANKS)]
    engines = [module.Engine(heap=heap, self=place, spins=0) for place, heap in enumerate(heaps)]
    ends = socket.socketpair()
    for place, engine in enumerate(engines):
        for other, heap in enumerate(heaps):
            own = other == place
            file = -1 if own else os.dup(heap.file)
            door = -1 if own else ends[place].detach()
            engine.add_peer(file=file, size=heap.size, socket=door, process=os.getpid())
    return engines, heaps


def _tensor(heap: Any, values: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """Return values in shared memory, or in memory of their own."""
    if draw.random() < 0.5:
        return values.clone()
    block = heap.allocate(values.nbytes)
    return torch.frombuffer(block, dtype=values.dtype, count=values.numel()).copy_(values)


def _tried(engines: list[Any], heaps: list[Any], pool: ThreadPoolExecutor, operation: str, draw: random.Random) -> bool:
    """Carry one collective out; return whether every rank got what it should."""
    reduces = operation in ("all_reduce", "reduce_scatter")
    dtype = draw.choice(tuple(FORMATS) if reduces else (torch.uint8,))
    how = draw.choice(("sum", "max", "min", "mean") if dtype.is_floating_point else ("sum", "max", "min"))
    count = draw.choice(SIZES)
    generator = torch.Generator().manual_seed(draw.getrandbits(60))
    numel = count * RANKS if operation == "reduce_scatter" else count
    values = [torch.randint(0, 5, (numel,), generator=generator).to(dtype) for _ in range(RANKS)]
    inputs = [_tensor(heap, value, draw) for heap, value in zip(heaps, values, strict=True)]
    total = torch.empty(numel, dtype=dtype)
    if reduces:
        kernels.reference("combine")(total, values, how)
    # all_to_all: what rank 0, and rank 1, gives to rank 0; the rest is for rank 1.
    cuts = [draw.randint(0, count) for _ in range(RANKS)]
    starts = [[0, cut, count] for cut in cuts]
    takes = [[0, cuts[0], sum(cuts)], [0, count - cuts[0], 2 * count - sum(cuts)]]
    expected = {
        "all_to_all": [
            torch.cat([value[:cut] for value, cut in zip(values, cuts, strict=True)]),
            torch.cat([value[cut:] for value, cut in zip(values, cuts, strict=True)]),
        ],
        "all_reduce": [total] * RANKS,
        "reduce_scatter": list(total.chunk(RANKS)) if operation == "reduce_scatter" else [],
        "all_gather": [torch.cat(values)] * RANKS,
        "broadcast": [values[0]] * RANKS,
    }[operation]
    in_place = operation in ("all_reduce", "broadcast")
    outputs = inputs if in_place else [torch.empty_like(tensor) for tensor in expected]

    def start(place: int) -> Any:
        format_, reduction = (FORMATS[dtype], REDUCTIONS[how]) if reduces else (FORMATS[torch.uint8], 0)
        return engines[place].issue(
            0, list(range(RANKS)), place, OPERATIONS[operation], format_, reduction, 0, count,
            inputs[place].data_ptr(), outputs[place].data_ptr(),
            *((starts[place], takes[place]) if operation == "all_to_all" else ([], [])),
        )  # fmt: skip

    handles = [start(place) for place in range(RANKS)]
    over = pool.map(lambda place: engines[place].wait(handles[place], LIMIT), range(RANKS))
    if not all(over):
        return False
    return all(torch.equal(found, right) for found, right in zip(outputs, expected, strict=True))
