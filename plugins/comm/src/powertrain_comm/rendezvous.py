"""How ranks meet, and who owns torch's one default process group."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from powertrain.errors import CommunicatorMissing, LaunchError

if TYPE_CHECKING:
    from powertrain.environment import Rank
    from powertrain.roles.accelerator import Accelerator

_log = logging.getLogger("powertrain.comm")

# torch lists these two as backends, but they move no data.
NO_TRANSPORT = frozenset({"undefined", "fake"})

LINGER = 5.0
"""Seconds that a closing rank waits, at most, for the others."""

PAUSE = 0.01
"""Seconds between two looks whether the others have come."""

WAIT_TOLD = 10.0
"""Seconds after which a rank that waits for the others says so."""

HEAD_START = 0.1
"""Seconds that rank 0 has to take the store down, before the others can ask for the next one."""


def choose_backend(name: str | None, accelerator: Accelerator) -> str | None:
    """Return torch's name of the backend to use, or None if ``name`` is no backend of torch.

    Args:
        name: the backend; None takes the first of ``accelerator.backends()`` that this torch has.
        accelerator: whose memory the backend must reach.

    Raises:
        CommunicatorMissing: torch knows the backend, but was built without it.
    """
    if name is None:
        return next((backend for backend in accelerator.backends() if dist.is_backend_available(backend)), None)
    if name not in dist.Backend.backend_list or name in NO_TRANSPORT:
        return None
    if not dist.is_backend_available(name):
        raise CommunicatorMissing(
            f"this build of torch lacks the backend {name!r}",
            where="[communicator] use",
            expected=" or ".join(backend for backend in accelerator.backends() if dist.is_backend_available(backend)),
            remedy="leave `[communicator] use` out, or install a build of torch that has it",
        )
    return name


class Lease(weakref.ref["dist.ProcessGroup"]):
    """One communicator's claim on the default process group, which torch keeps one of per process.

    The claims are found through the group itself, so that nothing has to be
    kept beside it. The group ends with the last claim, unless the user made it.
    """

    __slots__ = ("held", "ours", "store")

    ours: bool
    held: bool
    store: PrefixStore | None

    @classmethod
    def take(cls, group: dist.ProcessGroup, *, created: bool, store: PrefixStore | None = None) -> Lease:
        """Claim ``group``, which this communicator ``created`` by means of ``store``, or found."""
        others = cls.holders(group)
        lease = cls(group)
        lease.ours = created or any(other.ours for other in others)
        lease.store = next((other.store for other in others if other.store is not None), store)
        lease.held = True
        return lease

    @classmethod
    def holders(cls, group: dist.ProcessGroup) -> list[Lease]:
        """Return the live claims on ``group``."""
        return [ref for ref in weakref.getweakrefs(group) if isinstance(ref, cls) and getattr(ref, "held", False)]

    def release(self, *, peacefully: bool) -> None:
        """Give the claim up; the last one of a group that we made destroys it.

        Args:
            peacefully: wait, a few seconds at most, until the others have come as far.
        """
        self.held = False
        group = self()
        if group is None or not self.ours or self.holders(group) or not dist.is_initialized():
            return
        rank, size = dist.get_rank(), dist.get_world_size()
        dist.destroy_process_group()
        if peacefully and self.store is not None:
            _part(self.store, rank, size)
        self.store = None


def join(backend: str, rank: Rank, timeout: float) -> tuple[Lease, bool]:
    """Return a claim on the default process group of this process, and whether it was made here.

    A group that exists already is reused. A new one meets at ``rank.address``
    and ``rank.port``: in the store of torchrun's agent where there is one, else
    in a store that rank 0 hosts.

    Raises:
        LaunchError: the group that exists has another size or rank, or the ranks could not meet.
    """
    if dist.is_initialized():
        found = (dist.get_rank(), dist.get_world_size())
        if found != (rank.index, rank.world_size):
            raise LaunchError(
                "torch.distributed was initialized for another launch than this one",
                expected=f"rank {rank.index} of {rank.world_size} (from {rank.launcher})",
                found=f"rank {found[0]} of {found[1]}",
                remedy="initialize torch.distributed with the launcher's numbers, or leave it to powertrain",
            )
        return Lease.take(_world(), created=False), False
    limit = timedelta(seconds=timeout)
    if backend == "mpi":
        dist.init_process_group(backend)  # mpirun itself tells rank and size
        return Lease.take(_world(), created=True), True
    host = f"[{rank.address}]" if ":" in rank.address else rank.address
    patience = threading.Timer(WAIT_TOLD, _tell_waiting, [rank])
    patience.daemon = True
    patience.start()
    try:
        url = f"tcp://{host}:{rank.port}"
        store, _, _ = next(iter(rendezvous(url, rank=rank.index, world_size=rank.world_size, timeout=limit)))
        # A launcher's store outlives a group: the keys of an earlier one must not be taken for ours.
        start = store.add(f"powertrain/starts/{rank.index}", 1)
        scope = PrefixStore(f"powertrain/{start}", store)
        dist.init_process_group(backend, store=scope, rank=rank.index, world_size=rank.world_size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {rank.index} of {rank.world_size} could not meet the others at {rank.address}:{rank.port}",
            found=str(error).splitlines()[0],
            remedy="check that all ranks were started, and that MASTER_ADDR and MASTER_PORT name a free port of rank 0",
        ) from error
    finally:
        patience.cancel()
    return Lease.take(_world(), created=True, store=scope), True


def _tell_waiting(rank: Rank) -> None:
    _log.warning(
        "rank %d of %d waits for the others at %s:%d; have all been started?",
        rank.index, rank.world_size, rank.address, rank.port,
    )  # fmt: skip


def _part(store: PrefixStore, rank: int, size: int) -> None:
    """Leave the store together: ranks that meet again at once must not find the old one of a slow rank 0."""
    deadline = time.monotonic() + LINGER
    with contextlib.suppress(RuntimeError):  # a rank that died took the store along, or is not waited for
        store.add("arrived", 1)
        while store.add("arrived", 0) < size and time.monotonic() < deadline:
            time.sleep(PAUSE)
        store.add("parted", 1)
        while rank == 0 and store.add("parted", 0) < size and time.monotonic() < deadline:
            time.sleep(PAUSE)
    if rank != 0:
        time.sleep(HEAD_START)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group
