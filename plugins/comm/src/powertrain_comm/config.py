"""The ``[comm]`` table."""

from __future__ import annotations

from typing import Literal

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

    algorithms: Literal["measured", "pairwise", "gloo"] = "measured"
    """How gloo's collectives of 64 KiB and more are carried out. ``measured``, the default: by the algorithm that was
    faster on this host, which is measured at its first start, in a second at most, and kept in the cache.
    ``pairwise``: gather and reduce-scatter by direct exchanges, summed in the order of ranks; all_reduce by gloo.
    ``gloo``: everything by gloo. Algorithms add in different orders, so results may differ in the last bits: name
    one where runs must be equal bit by bit on several hosts, or without the cache."""

    @cross_check.validator
    def _needs_watchdog(self, attribute: attrs.Attribute[bool], value: bool) -> None:
        if value and not self.watchdog:
            raise ValueError("cross_check needs watchdog = true")
