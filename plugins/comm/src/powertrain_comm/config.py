"""The ``[comm]`` table."""

from __future__ import annotations

from typing import Literal

import attrs

Method = Literal["none", "onebit", "int8", "int4", "topk", "optimizer"]


@attrs.frozen(kw_only=True)
class Compress:
    """How gradients travel; parameters, losses and norms are never compressed."""

    method: Method = "none"
    """"onebit": signs, with a magnitude for each block. "int8", "int4": blockwise integers. "topk": the largest
    elements. "optimizer": what the optimizer asks for (1-bit Adam, 0/1 Adam, 1-bit LAMB), exact until it does.
    Default "none"."""

    ratio: float = attrs.field(default=0.01)
    """The part of the elements that "topk" sends, above 0 and at most 1. Default 0.01."""

    after: int = attrs.field(default=0)
    """Steps that travel exactly before compression begins; 1-bit methods need such a warm-up. Default 0."""

    block: int = attrs.field(default=256)
    """Elements that share a magnitude or scale, a multiple of 8. Default 256."""

    error_feedback: bool = True
    """Add to what is sent next what was rounded away now. Default true. Costs 4 bytes for each gradient element that
    a rank sends; "onebit" and "topk" do not converge without it."""

    least: int = attrs.field(default=16384)
    """Messages of fewer elements travel exactly. Default 16384."""

    dimension: str | None = None
    """Compress only along this mesh dimension, such as "data.across4" between nodes of four ranks. Default: along
    every one."""

    @ratio.validator
    def _is_a_part(self, attribute: attrs.Attribute[float], value: float) -> None:
        if not 0 < value <= 1:
            raise ValueError(f"{attribute.name} must be above 0 and at most 1, not {value}")

    @block.validator
    def _is_whole_bytes(self, attribute: attrs.Attribute[int], value: int) -> None:
        if value < 8 or value % 8:
            raise ValueError(f"block must be a positive multiple of 8, not {value}")

    @after.validator
    def _counts(self, attribute: attrs.Attribute[int], value: int) -> None:
        if value < 0:
            raise ValueError(f"{attribute.name} must not be negative, but is {value}")

    @least.validator
    def _is_some(self, attribute: attrs.Attribute[int], value: int) -> None:
        if value < 1:
            raise ValueError(f"{attribute.name} must be at least 1, not {value}")


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

    compress: Compress = attrs.field(factory=Compress)
    """The table ``[comm.compress]``: gradients in fewer bytes."""

    @cross_check.validator
    def _needs_watchdog(self, attribute: attrs.Attribute[bool], value: bool) -> None:
        if value and not self.watchdog:
            raise ValueError("cross_check needs watchdog = true")
