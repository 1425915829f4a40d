"""In which order units are reduced where parameters stay whole (stages 1 and 2): one order, the same on all ranks.

At first it is the reverse of registration. Then it is the order in which gradients
came to the first data rank in the first step, for a model may be registered in
another order than it runs. A unit some of whose gradients do not come in this step
(experts without tokens) does not hold up those behind it for long: it is sent with
what it has, and what comes later is sent once more, when the ranks have agreed on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from powertrain.roles.communicator import Communicator
from powertrain_zero.unit import Unit

OPEN = 4
"""Complete units that wait behind one that is not, each with a whole buffer, before that one is sent as it is."""


class Reductions:
    """Sends units in one order as their gradients become complete.

    Args:
        units: all units, in the order of registration.
        communicator: connects the data ranks.
    """

    def __init__(self, units: Sequence[Unit], communicator: Communicator) -> None:
        self._units = list(units)
        self._communicator = communicator
        self._order = list(reversed(self._units))
        self._next = len(self._order)  # nothing is under way
        self._unsent: set[Unit] = set()
        self._ready: set[Unit] = set()  # complete, and behind one that is not
        self._came: dict[Unit, None] = {}
        self._learned = communicator.size("data") == 1

    def begin(self) -> None:
        """Start a micro-batch whose gradients travel."""
        self._next = 0
        self._unsent = set(self._order)
        self._ready.clear()

    def completed(self, unit: Unit) -> None:
        """Take note that a unit may be complete, and send what is due."""
        if not unit.complete:
            return
        self._came.setdefault(unit)
        if unit not in self._unsent:
            return  # what came after it was sent goes with the last ones
        self._ready.add(unit)
        self._send_complete()
        while len(self._ready) > OPEN:
            self._send()  # what its missing gradients would add comes after the others
            self._send_complete()

    def finish(self) -> None:
        """Send what was not complete: the same on every rank, whatever branches it took."""
        while self._next < len(self._order):
            self._send()

    def learn(self) -> None:
        """After the first step, keep the order in which gradients came; every rank must call it."""
        if self._learned:
            return
        self._learned = True
        rest = [unit for unit in self._order if unit not in self._came]
        number = {unit: number for number, unit in enumerate(self._units)}
        order = torch.tensor([number[unit] for unit in [*self._came, *rest]], device=self._communicator.device)
        self._communicator.broadcast(order, 0, label="order of the reductions").wait()
        self._order = [self._units[number] for number in order.tolist()]

    def _send_complete(self) -> None:
        while self._next < len(self._order) and self._order[self._next].complete:
            self._send()

    def _send(self) -> None:
        unit = self._order[self._next]
        self._next += 1
        self._unsent.discard(unit)
        self._ready.discard(unit)
        unit.send()
