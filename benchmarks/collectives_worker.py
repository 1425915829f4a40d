"""One rank of benchmarks/collectives.py: reads what to time, a line each, and answers when it began and ended."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")
Action = Callable[[], Any]
# Bytes that a turn goes through at the least: smaller messages are sent several times, each on tensors of its own, as
# the buckets of a step are; one tensor again and again would lie in a cache.
TURN = 64 * 2**20


def answer(text: str) -> None:
    print(f"= {text}", flush=True)


def gloo(name: str, whole: torch.Tensor, piece: torch.Tensor) -> Action:
    return {
        "all_reduce": lambda: dist.all_reduce(whole),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(piece, whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, piece),
    }[name]


def ours() -> Callable[[str, int, int], Action]:
    """Connect as an engine would; return what makes an action of a name, a size and a number of the tensors."""
    from powertrain.environment import Rank
    from powertrain.mesh import Mesh
    from powertrain_comm.shm.start import share
    from powertrain_comm.transport import TorchCommunicator

    rank = Rank.from_environment()
    mesh = Mesh.build(rank.world_size, rank.index)
    inner = TorchCommunicator("gloo", torch.device("cpu"), mesh, rank, 120.0)
    inner.choose_algorithms("measured", rank)
    if rank.index == 0:
        print(inner.describe()["algorithms, world"], file=sys.stderr, flush=True)
    comm = share(inner, rank, 120.0, asked=True)
    tensors: dict[tuple[str, int, int], torch.Tensor] = {}

    def make(what: str, numel: int, number: int) -> Action:
        def tensor(where: str, numel: int) -> torch.Tensor:
            if (where, numel, number) not in tensors:
                made = comm.empty(numel, torch.float32) if where == "empty" else torch.empty(numel)
                tensors[where, numel, number] = made.fill_(1e-6)
            return tensors[where, numel, number]

        where, _, name = what.partition(":")
        whole = tensor("empty" if where == "empty" else "any", numel)
        size = numel // rank.world_size
        if where == "plain":
            half, other = numel // 2, tensor("other", numel)
            return {
                "rmw": lambda: whole.add_(1e-9),
                "copy": lambda: other.copy_(whole),
                "add": lambda: torch.add(whole[:half], whole[half:], out=other[:half]),
            }[name]
        piece = tensor("piece", size)
        if where == "gloo":
            return gloo(name, whole, piece)
        if name == "all_gather" and where == "empty":
            piece = whole[size * rank.index : size * (rank.index + 1)]
        way = inner if where == "chosen" else comm
        return {
            "all_reduce": lambda: way.all_reduce(whole).wait(),
            "reduce_scatter": lambda: way.reduce_scatter(piece, whole).wait(),
            "all_gather": lambda: way.all_gather(whole, piece).wait(),
        }[name]

    return make


def deepspeed() -> Callable[[str, int, int], Action]:
    """Let DeepSpeed connect the ranks; its all_reduce through shared memory is the one of its inference."""
    import deepspeed as peer

    peer.init_distributed("gloo")
    tensors: dict[tuple[int, int], torch.Tensor] = {}

    def make(what: str, numel: int, number: int) -> Action:
        whole = tensors.setdefault((numel, number), torch.full((numel,), 1e-6))
        return lambda: peer.comm.inference_all_reduce(whole)

    return make


def main(kind: str) -> None:
    torch.set_num_threads(1)
    make = {"ours": ours, "deepspeed": deepspeed}[kind]()
    answer("ready")
    for line in sys.stdin:
        what, megabytes = line.split()
        size = int(float(megabytes) * 2**20)
        actions = [make(what, size // 4, number) for number in range(max(1, TURN // size))]
        dist.barrier()
        started = time.monotonic()
        for action in actions:
            action()
        answer(f"{started!r} {time.monotonic()!r} {len(actions)}")


if __name__ == "__main__":
    main(sys.argv[1])
