"""The ``[observe]`` table."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class ObserveConfig:
    """What a run shows of itself."""

    comm: bool = False
    """Count and time collectives, per operation and mesh dimension, and log a table of rank 0 when the engine closes.
    Default false. Costs a few microseconds a collective."""

    comm_every: int = attrs.field(default=0)
    """Log the table after every so many steps as well. Default 0: only at the end. Needs ``comm``."""

    @comm_every.validator
    def _needs_comm(self, attribute: attrs.Attribute[int], value: int) -> None:
        if value < 0:
            raise ValueError("comm_every is a number of steps: 0 or more")
        if value and not self.comm:
            raise ValueError("comm_every needs comm = true")
