"""From a communicator over the network to one that shares memory where it can."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from powertrain import native
from powertrain.errors import CommunicatorMissing
from powertrain.mesh import DIMENSIONS, WORLD
from powertrain_comm.shm.communicator import SharedMemoryCommunicator
from powertrain_comm.shm.hierarchy import neighbours, spans
from powertrain_comm.shm.peers import Unavailable, connect
from powertrain_comm.shm.source import SOURCE
from powertrain_comm.transport import TorchCommunicator

if TYPE_CHECKING:
    from powertrain.environment import Rank
    from powertrain.roles.communicator import Communicator
    from powertrain_comm.algorithms import Setting

_log = logging.getLogger("powertrain.comm")


def share(
    inner: TorchCommunicator, rank: Rank, timeout: float, *, asked: bool, algorithms: Setting = "pairwise"
) -> Communicator:
    """Return a communicator that goes through shared memory between ranks of one host; every rank calls it.

    Args:
        inner: connects all ranks; it carries out what shared memory cannot.
        rank: this process's place in the launch.
        timeout: seconds that a collective may take.
        asked: the configuration names it; otherwise ``inner`` alone will do.
        algorithms: what ``[comm] algorithms`` says, for what goes over the network.

    Raises:
        CommunicatorMissing: shared memory was asked for, and a rank cannot have it.
        CommunicationError: a rank did not come.
    """
    try:
        if sys.platform != "linux":
            raise Unavailable(f"{sys.platform} has no memory that can be shared without a name")
        host = connect(native.try_load(SOURCE, "gloo"), inner, rank)
    except Unavailable as error:
        if asked:
            inner.close()
            raise CommunicatorMissing(
                "there is no shared memory between the ranks",
                where="[communicator] use",
                found=str(error),
                remedy="leave the key out to go without, or mend what is found; `powertrain doctor` shows more",
            ) from None
        if rank.index == 0:
            _log.warning("ranks talk over the loopback network, not through shared memory: %s", error)
        inner.choose_algorithms(algorithms, rank)
        return inner
    except BaseException:
        inner.close()
        raise
    network = None
    if len(set(host.hosts)) > 1:
        network = TorchCommunicator("gloo", inner.device, inner.mesh, rank, timeout)
        try:
            _choose(inner, network, host.hosts, rank, algorithms)
        except BaseException:
            network.close()
            inner.close()
            raise
    return SharedMemoryCommunicator(inner, host, timeout, network)


def _choose(
    inner: TorchCommunicator, network: TorchCommunicator, hosts: tuple[int, ...], rank: Rank, algorithms: Setting
) -> None:
    """Choose algorithms for what crosses the network: ``inner`` carries whole collectives, ``network`` hops."""
    mesh = inner.mesh

    def whole(name: str) -> bool:
        return spans(mesh, name, hosts) and neighbours(mesh, name, hosts) <= 1

    def hop(name: str) -> bool:
        return name not in (WORLD, *DIMENSIONS) and spans(mesh, name, hosts)

    inner.choose_algorithms(algorithms, rank, whole)
    network.choose_algorithms(algorithms, rank, hop)
