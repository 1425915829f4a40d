"""Updates that go on during the next forward pass, of units that are used last in it.

That pass, and each after it, uses their parameters of one step before: what the update makes of them is shown to
the model when the next one begins. (The delayed parameter update of ZeRO-Offload, Ren et al. 2021, for a part.)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from powertrain_zero.batch import Batch
from powertrain_zero.unit import Unit
from powertrain_zero.work import Work, run_through


def late_units(units: Sequence[Unit], share: float) -> list[Unit]:
    """Return the units at the end of the model that make up a share of its trainable parameters, at most."""
    sizes = {unit: sum(part.flat.numel for part in unit.gradients) for unit in units}
    room = share * sum(sizes.values())
    found: list[Unit] = []
    for unit in reversed(units):
        room -= sizes[unit]
        if room < 0 or unit.plan.whole_pass:
            break
        found.append(unit)
    return found[::-1]


class Late:
    """Runs batches in a thread of its own.

    Args:
        batches: of the late units.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = list(batches)
        self.units = [unit for batch in batches for unit in batch.units]
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._unseen = False

    def start(self, work: Work, scale: float | torch.Tensor) -> None:
        """Begin the update; nothing else may touch these units' state or gradients until ``join``."""

        def run() -> None:
            try:
                with torch.no_grad():
                    for batch in run_through(self.batches, work, {}, scale):
                        del batch  # it is shown to the model later
            except BaseException as error:
                self._failure = error

        self._unseen = True
        self._thread = threading.Thread(target=run, name="late update", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the update under way.

        Raises:
            whatever it failed with.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._unseen = False
            raise failure

    def show(self) -> list[Unit]:
        """Bring what the last update made to where the model takes it from; return its units, to be published."""
        self.join()
        if not self._unseen:
            return []
        self._unseen = False
        for batch in self.batches:
            batch.show()
        return self.units
