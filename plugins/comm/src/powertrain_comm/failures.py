"""From what torch says to the error that says it for us."""

from __future__ import annotations

from powertrain.errors import CollectiveStalled, CommunicationError, PeerFailed
from powertrain.roles.communicator import Collective

LOST = ("connection closed", "connection reset", "broken pipe", "socket closed", "remote process exited")
LATE = ("timed out", "timeout")


def explain(error: Exception, collective: Collective, rank: int) -> CommunicationError:
    """Return the error of ours that says which collective failed, and as far as torch tells why."""
    text = str(error)
    low = text.lower()
    what = collective.operation + (f" of {collective.label!r}" if collective.label else "")
    where = f"rank {rank}, along {collective.dimension!r}"
    found = text.splitlines()[0] if text else type(error).__name__
    if any(sign in low for sign in LOST):
        return PeerFailed(f"{what} lost the connection to another rank", where=where, found=found)
    if any(sign in low for sign in LATE):
        return CollectiveStalled(f"{what} did not finish in time", where=where, found=found)
    return CommunicationError(f"{what} failed", where=where, found=found)
