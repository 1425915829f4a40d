"""The ``[comm]`` table."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class CommConfig:
    """How collectives are watched and checked."""

    watchdog: bool = True
    """Record every collective; when one stalls, ranks disagree or one fails, end all ranks with a report.
    Default true. Costs a few microseconds a collective and one idle thread."""

    cross_check: bool = attrs.field(default=False)
    """Compare operation, dimension, shape, dtype and reduction between the ranks before each collective, and fail
    before it starts. Default false. For debugging: each collective then waits for all its ranks before it starts.
    Needs ``watchdog``."""

    @cross_check.validator
    def _needs_watchdog(self, attribute: attrs.Attribute[bool], value: bool) -> None:
        if value and not self.watchdog:
            raise ValueError("cross_check needs watchdog = true")
