"""Each operation of the communicator role, as one call of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from powertrain.roles.communicator import Collective
from powertrain_comm.algorithms import Table

# torch 2.13 renamed these two; the old names warn there, the new ones are missing before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Group:
    """The ranks along one dimension, as torch knows them.

    Args:
        handle: torch's group.
        ranks: the global ranks, in order of index.
        backend: the name of the library.
        device: where the tensors live.
        rank: this process's global rank.

    Attributes:
        index: this process's place among ``ranks``.
        pairwise: whether direct exchanges may take the place of the library's own algorithms.
        table: where they do.
    """

    def __init__(
        self, handle: dist.ProcessGroup, ranks: Sequence[int], backend: str, device: torch.device, rank: int
    ) -> None:
        self.handle = handle
        self.ranks = tuple(ranks)
        self.index = self.ranks.index(rank)
        self.table = Table()
        self.pairwise = backend == "gloo" and device.type == "cpu"
        self.averages = backend == "nccl"  # the others sum, and the handle divides
        self.device_ids = [device.index] if backend == "nccl" else None

    def reduce_op(self, collective: Collective) -> Any:
        """Return torch's name for the reduction of ``collective``."""
        if collective.reduction == "mean":
            return dist.ReduceOp.AVG if self.averages else dist.ReduceOp.SUM
        return {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[collective.reduction]

    def global_rank(self, index: int | None) -> int:
        """Return the global rank at ``index`` along the dimension."""
        if index is None or not 0 <= index < len(self.ranks):
            raise ValueError(f"index {index} is not among the {len(self.ranks)} ranks along the dimension")
        return self.ranks[index]


def given(collective: Collective) -> torch.Tensor:
    """Return the input of ``collective``, which must have one."""
    if collective.input is None:
        raise ValueError(f"{collective.operation} needs an input")
    return collective.input


def taken(collective: Collective) -> torch.Tensor:
    """Return the output of ``collective``, which must have one."""
    if collective.output is None:
        raise ValueError(f"{collective.operation} needs an output")
    return collective.output


def _start_all_reduce(c: Collective, group: Group) -> Any:
    return dist.all_reduce(taken(c), group.reduce_op(c), group=group.handle, async_op=True)


def _start_all_gather(c: Collective, group: Group) -> Any:
    # Detached: gloo's own writes into pieces of the output, which autograd refuses for a parameter.
    return _all_gather(taken(c).detach().view(-1), given(c).detach().view(-1), group=group.handle, async_op=True)


def _start_reduce_scatter(c: Collective, group: Group) -> Any:
    op = group.reduce_op(c)
    return _reduce_scatter(taken(c).view(-1), given(c).view(-1), op, group=group.handle, async_op=True)


def _start_all_to_all(c: Collective, group: Group) -> Any:
    to_take = None if c.output_splits is None else list(c.output_splits)
    to_give = None if c.input_splits is None else list(c.input_splits)
    return dist.all_to_all_single(taken(c), given(c), to_take, to_give, group=group.handle, async_op=True)


def _start_broadcast(c: Collective, group: Group) -> Any:
    return dist.broadcast(taken(c), group.global_rank(c.peer), group=group.handle, async_op=True)


def _start_send(c: Collective, group: Group) -> Any:
    return dist.isend(given(c), group.global_rank(c.peer), group=group.handle)


def _start_receive(c: Collective, group: Group) -> Any:
    return dist.irecv(taken(c), group.global_rank(c.peer), group=group.handle)


def _start_barrier(c: Collective, group: Group) -> Any:
    return dist.barrier(group=group.handle, async_op=True, device_ids=group.device_ids)


START: dict[str, Callable[[Collective, Group], Any]] = {
    "all_reduce": _start_all_reduce,
    "all_gather": _start_all_gather,
    "reduce_scatter": _start_reduce_scatter,
    "all_to_all": _start_all_to_all,
    "broadcast": _start_broadcast,
    "send": _start_send,
    "receive": _start_receive,
    "barrier": _start_barrier,
}
"""How each operation begins; the work that is returned tells when it ends."""


def _together_all_reduce(parts: Sequence[Collective], group: Group) -> Any:
    options = dist.AllreduceCoalescedOptions()
    options.reduceOp = group.reduce_op(parts[0])
    return group.handle.allreduce_coalesced([taken(part) for part in parts], options)


def _together_all_gather(parts: Sequence[Collective], group: Group) -> Any:
    outputs = [taken(part).detach().view(-1) for part in parts]
    return group.handle.allgather_into_tensor_coalesced(outputs, [given(part).detach().view(-1) for part in parts])


def _together_reduce_scatter(parts: Sequence[Collective], group: Group) -> Any:
    options = dist.ReduceScatterOptions()
    options.reduceOp = group.reduce_op(parts[0])
    outputs = [taken(part).view(-1) for part in parts]
    return group.handle.reduce_scatter_tensor_coalesced(outputs, [given(part).view(-1) for part in parts], options)


START_TOGETHER: dict[str, Callable[[Sequence[Collective], Group], Any]] = {
    "all_reduce": _together_all_reduce,
    "all_gather": _together_all_gather,
    "reduce_scatter": _together_reduce_scatter,
}
"""How several operations of one kind, dimension, reduction and dtype begin as one."""
