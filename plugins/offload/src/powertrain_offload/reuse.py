"""Slots that are used again: what one step has saved and freed, the next saves into."""

from __future__ import annotations

from collections import deque

import attrs

from powertrain.roles.communicator import Handle
from powertrain.roles.tier import Lease, Slot, Tier

SLACK = 1.25
"""How much larger than what goes into it a slot may be."""

PASSES = 2
"""Forward passes for which a slot is kept that nobody takes."""


@attrs.frozen(eq=False)
class _Idle:
    """A slot that nobody needs, since a forward pass; what was stored last may be on its way into it."""

    slot: Slot
    stored: Handle
    since: int


class Slots:
    """Slots of a tier, lent for one piece after the other.

    Args:
        tier: which reserves them.
        label: what they are for, for people.
    """

    def __init__(self, tier: Tier, label: str) -> None:
        self._tier, self._label = tier, label
        self._returned: deque[tuple[Slot, Handle, Lease | None]] = deque()
        self._idle: list[_Idle] = []
        self._passes = 0
        self._closed = False
        self._reserved = 0
        self._taken = 0

    @property
    def reserved(self) -> int:
        """Bytes that are set aside."""
        self._collect()
        return self._reserved

    @property
    def taken(self) -> int:
        """Bytes of slots that are lent."""
        self._collect()
        return self._taken

    def begin(self) -> None:
        """Note that a forward pass begins."""
        self._passes += 1
        self._collect()

    def take(self, nbytes: int) -> Slot:
        """Return a slot of so many bytes, or a little more.

        Raises:
            StorageError: there is no room, or what the slot held last could not be stored.
        """
        self._collect()
        fitting = [idle for idle in self._idle if nbytes <= idle.slot.nbytes <= SLACK * nbytes]
        if fitting:
            best = min(fitting, key=lambda idle: idle.slot.nbytes)
            self._idle.remove(best)
            best.stored.wait()
            slot = best.slot
        else:
            # The batches have another shape now: what no recent pass has used will not be used.
            self._free([idle for idle in self._idle if idle.since + PASSES < self._passes])
            slot = self._tier.reserve(self._label, nbytes)
            self._reserved += slot.nbytes
        self._taken += slot.nbytes
        return slot

    def put_back(self, slot: Slot, stored: Handle, lease: Lease | None) -> None:
        """Take a slot back, at any moment and in any thread: it is looked at later."""
        self._returned.append((slot, stored, lease))

    def close(self) -> None:
        """Free what is not lent; what is lent is freed as it comes back and somebody asks."""
        self._closed = True
        self._collect()

    def _collect(self) -> None:
        while self._returned:
            slot, stored, lease = self._returned.popleft()
            if lease is not None:
                lease.release()
            self._taken -= slot.nbytes
            self._idle.append(_Idle(slot, stored, self._passes))
        if self._closed:
            self._free(list(self._idle))

    def _free(self, unused: list[_Idle]) -> None:
        for idle in unused:
            self._idle.remove(idle)
            self._reserved -= idle.slot.nbytes
            idle.slot.free()
