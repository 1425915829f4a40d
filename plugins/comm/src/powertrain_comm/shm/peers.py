"""How the ranks of a host find one another and map each other's memory.

Every rank makes one file of shared memory that has no name, and hands it to the
others over a local socket. Nothing lies in any directory, so nothing is left
behind however a rank ends. The sockets stay open: their end is a peer's end.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import attrs

from powertrain.errors import CommunicationError
from powertrain.mesh import WORLD

if TYPE_CHECKING:
    from powertrain.environment import Rank
    from powertrain.roles.communicator import Communicator

DIMENSIONS = 64
"""Dimensions, those of ``split`` included, that can have lanes of their own."""

PATIENCE = 60.0
"""Seconds that a rank waits for another one to connect."""

SPINS = 2000
"""Looks at its peers that a rank takes before it sleeps, where each rank has a core of its own."""

ADDRESSES = 1 << 45
"""Bytes of address space for all ranks' memory: a quarter of what a process has on x86-64."""

_HELLO = struct.Struct("=QQQ")  # who calls, its token, the length of its memory
_CREDENTIALS = struct.Struct("3i")  # process, user, group


class Unavailable(Exception):
    """Shared memory cannot be had; says why."""


@attrs.frozen
class Host:
    """The ranks of this host, connected.

    Attributes:
        heap: this rank's shared memory.
        engine: carries out collectives.
        ranks: the global ranks, in the order of their places.
        hosts: of every global rank, the number of its host.
    """

    heap: Any
    engine: Any
    ranks: tuple[int, ...]
    hosts: tuple[int, ...]

    def lane(self, dimension: int, source: int | None = None, target: int | None = None) -> int:
        """Return the lane of a dimension's collectives, or of what one rank sends to another there."""
        count = len(self.ranks)
        first = dimension * (1 + count * count)
        return first if source is None or target is None else first + 1 + source * count + target


def lanes(ranks: int) -> int:
    """Return how many lanes ``ranks`` ranks of a host can need."""
    return DIMENSIONS * (1 + ranks * ranks)


def host_name(rank: Rank) -> str:
    """Return what is the same for ranks of one host, and differs between hosts: kernel, network and launcher's node."""
    boot, network = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        network = str(Path("/proc/self/ns/net").readlink())
    return f"{socket.gethostname()} {boot} {network} {rank.index - rank.local_index}"


def connect(module: ModuleType | None, inner: Communicator, rank: Rank) -> Host:
    """Connect the ranks of this host; every rank of the world calls it.

    Args:
        module: the built C++; None where this rank has none.
        inner: over which ranks tell each other where they are.
        rank: this process's place in the launch.

    Raises:
        Unavailable: on some rank something is missing; raised on all ranks alike.
        CommunicationError: a rank of this host did not come.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        mine, heap = _offer(server, module, rank)
        facts = inner.gather_json(mine, WORLD, label="shared memory: who is where")
        ranks = tuple(index for index, fact in enumerate(facts) if fact["host"] == mine["host"])
        if reason := next((fact["reason"] for fact in facts if fact["reason"]), ""):
            raise Unavailable(reason)
        assert module is not None
        assert heap is not None
        place = ranks.index(rank.index)
        spins = SPINS if len(ranks) <= len(os.sched_getaffinity(0)) else 0
        engine = module.Engine(heap=heap, self=place, spins=spins)
        here = [facts[index] for index in ranks]
        reason = _map(engine, _meet(server, here, place, heap), rank)
    reasons = inner.gather_json(reason, WORLD, label="shared memory: who has mapped it")
    if reason := next((reason for reason in reasons if reason), ""):
        engine.close()
        raise Unavailable(reason)
    names = [fact["host"] for fact in facts]
    return Host(heap, engine, ranks, tuple(names.index(name) for name in names))


def _offer(server: socket.socket, module: ModuleType | None, rank: Rank) -> tuple[dict[str, Any], Any]:
    """Make this rank's memory and open its door; return what the others need to know, and the memory."""
    name, token = f"powertrain-{secrets.token_hex(16)}", secrets.randbits(63)
    heap, reason = None, ""
    try:
        if module is None:
            raise RuntimeError("its C++ is not there: see what it says of powertrain_shared_memory")
        if rank.local_size > module.MAX_RANKS:
            raise RuntimeError(f"{rank.local_size} ranks on one host are more than {module.MAX_RANKS}")
        heap = module.Heap(size=_memory(rank.local_size), lanes=lanes(rank.local_size))
        server.bind(f"\0{name}")  # in no directory
        server.listen(rank.local_size)
        server.settimeout(PATIENCE)
    except (OSError, RuntimeError) as error:
        reason = f"rank {rank.index}: {error}"
    return {"host": host_name(rank), "name": name, "token": token, "reason": reason, "rank": rank.index}, heap


def _memory(ranks: int) -> int:
    """Return the bytes of address space for a rank's shared memory; what is not touched costs nothing.

    As much as the host has, but for what a process can address: it maps the memory of every rank.
    """
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), ADDRESSES // ranks // 4096 * 4096)


def _map(engine: Any, peers: Sequence[dict[str, int]], rank: Rank) -> str:
    """Map the memory of every rank of this host; return what prevented it, if anything did."""
    for number, peer in enumerate(peers):
        try:
            engine.add_peer(**peer)
        except RuntimeError as error:
            for left in peers[number:]:
                for descriptor in (left["file"], left["socket"]):
                    if descriptor >= 0:
                        os.close(descriptor)
            return f"rank {rank.index}: {error} (`ulimit -v` limits addresses)"
    return ""


def _meet(server: socket.socket, facts: Sequence[dict[str, Any]], place: int, heap: Any) -> list[dict[str, int]]:
    """Exchange files of memory with every rank of this host; return what ``Engine.add_peer`` wants of each."""
    hello = _HELLO.pack(place, facts[place]["token"], heap.size)
    doors: dict[int, socket.socket] = {}
    found: dict[int, dict[str, int]] = {place: {"file": -1, "size": heap.size, "socket": -1, "process": os.getpid()}}
    try:
        for other in range(place):
            doors[other] = door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            door.settimeout(PATIENCE)
            door.connect(f"\0{facts[other]['name']}")
            socket.send_fds(door, [hello], [heap.file])
        for _ in range(place + 1, len(facts)):
            door, _ = server.accept()
            door.settimeout(PATIENCE)
            other, file, size = _greet(door, facts)
            doors[other] = door
            socket.send_fds(door, [hello], [heap.file])
            found[other] = _peer(door, file, size)
        for other in range(place):
            named, file, size = _greet(doors[other], facts)
            found[named] = _peer(doors[other], file, size)
    except OSError as error:
        for door in doors.values():
            door.close()
        missing = [facts[other]["rank"] for other in range(len(facts)) if other not in found]
        raise CommunicationError(
            "a rank of this host did not come to share its memory",
            where=f"rank {facts[place]['rank']}",
            expected=f"rank {', '.join(map(str, missing))}",
            found=str(error),
            remedy='look at that rank\'s own message; `[communicator] use = "gloo"` goes without shared memory',
        ) from error
    return [found[other] for other in range(len(facts))]


def _greet(door: socket.socket, facts: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
    """Receive who is there, its file and the file's length; only a rank of this run knows its token."""
    data, files, _, _ = socket.recv_fds(door, _HELLO.size, 1)
    if len(data) == _HELLO.size and len(files) == 1:
        other, token, size = _HELLO.unpack(data)
        if other < len(facts) and token == facts[other]["token"]:
            return other, files[0], size
    for file in files:
        os.close(file)
    raise ConnectionError("a stranger called, or a rank ended while it spoke")


def _peer(door: socket.socket, file: int, size: int) -> dict[str, int]:
    process, _, _ = _CREDENTIALS.unpack(door.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    door.setblocking(False)
    return {"file": file, "size": size, "socket": door.detach(), "process": process}
