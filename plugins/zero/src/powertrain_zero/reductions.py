"""In which order units are reduced where parameters stay whole (stages 1 and 2): one order, the same on all ranks.

At first it is the reverse of registration. Then it is the order in which the last
gradient of each unit came to the first data rank in the first step, for a model may
be registered in another order than it runs. A unit some of whose gradients do not come in this step
(experts without tokens) does not hold up those behind it for long: it is sent with
what it has, and what comes later is sent once more, when the ranks have agreed on it.
"""

from __future__ import annotations

from collections import OrderedDict
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
        self._unsent: OrderedDict[Unit, None] = OrderedDict()  # of the micro-batch under way, in order
        self._ready: set[Unit] = set()  # complete, and behind one that is not
        self._came: dict[Unit, None] = {}
        self._learned = communicator.size("data") == 1

    def begin(self) -> None:
        """Start a micro-batch whose gradients travel."""
        self._unsent = OrderedDict.fromkeys(self._order)
        self._ready.clear()

    def arrived(self, unit: Unit) -> None:
        """Take note of a gradient of a unit, and send what is due."""
        if not self._learned:
            self._came.pop(unit, None)
            self._came[unit] = None
        if not unit.complete or unit not in self._unsent:  # what comes after it was sent goes with the last ones
            return
        self._ready.add(unit)
        self._send_complete()
        while len(self._ready) > OPEN:
            self._send()  # what its missing gradients would add comes after the others
            self._send_complete()

    def finish(self) -> None:
        """Send what was not complete: the same on every rank, whatever branches it took."""
        while self._unsent:
            self._send()

    def learn(self) -> None:
        """After the first step with gradients, keep the order in which they came; every rank must call it."""
        if self._learned:
            return
        order = list(self._came)
        for before, unit in zip([None, *self._order], self._order, strict=False):
            if unit not in self._came:  # where it would have come, as far as registration tells
                order.insert(0 if before is None else order.index(before) + 1, unit)
        number = {unit: number for number, unit in enumerate(self._units)}
        facts = [len(self._came), *(number[unit] for unit in order)]
        told = torch.tensor(facts, device=self._communicator.device)
        self._communicator.broadcast(told, 0, label="order of the reductions").wait()
        came, *numbers = told.tolist()
        self._order = [self._units[number] for number in numbers]
        self._learned = came > 0

    def _send_complete(self) -> None:
        while self._unsent and next(iter(self._unsent)).complete:
            self._send()

    def _send(self) -> None:
        unit, _ = self._unsent.popitem(last=False)
        self._ready.discard(unit)
        unit.send()
