"""Ports for ranks to meet on."""

from __future__ import annotations

import socket

import pytest

from powertrain.testing import ports


def test_a_port_is_free_and_no_connection_gets_it() -> None:
    """It can be listened on, and lies below those that the system gives to connections."""
    first = int(ports.RANGE.read_text().split()[0]) if ports.RANGE.exists() else ports.USUAL
    for _ in range(20):
        port = ports.free_port()
        assert ports.LOWEST <= port < first
        with socket.socket() as own:
            own.bind(("", port))


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that somebody listens on is passed over; where all are, it is an error."""
    spare = ports.free_port()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        numbers = iter([busy, busy, spare])
        monkeypatch.setattr(ports.random.SystemRandom, "randrange", lambda self, low, high: next(numbers, busy))
        assert ports.free_port() == spare
        with pytest.raises(RuntimeError, match="no port"):
            ports.free_port()
