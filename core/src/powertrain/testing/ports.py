"""Ports of this machine on which ranks can meet."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOWEST = 10_000
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
USUAL = 32_768
"""Where the range of Linux begins, from which connections get theirs."""


def free_port() -> int:
    """Return a port that nobody uses, and that no connection will be given before somebody listens on it.

    A port that the system picks is one of those it gives to connections as well: with other programs at work it may
    be taken again between the look and its use.

    Raises:
        RuntimeError: a hundred were tried and all are in use.
    """
    try:
        first = int(RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = USUAL
    choice = random.SystemRandom()
    for _ in range(100):
        port = choice.randrange(LOWEST, first) if first > LOWEST + 1000 else 0
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RuntimeError(f"no port between {LOWEST} and {first} is free")
