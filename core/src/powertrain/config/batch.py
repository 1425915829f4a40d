"""The batch sizes of a run: total = micro x accumulation x data ranks; any two give the third."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from powertrain.config.origin import DEFAULT, Origin, derived
from powertrain.config.problem import Problem, error
from powertrain.config.tables import Batch


@attrs.frozen(kw_only=True)
class BatchSizes:
    """Batch sizes that fit one another.

    Attributes:
        micro: samples in one forward pass on one rank.
        accumulation: micro-batches in one optimizer step.
        total: samples in one optimizer step over all ranks.
        origins: ``batch.<key>`` of each value that was not given, to what it was derived from.
    """

    micro: int
    accumulation: int
    total: int
    origins: Mapping[str, Origin]


@attrs.frozen
class Clash:
    """Batch sizes that contradict one another: the arithmetic, and what would work."""

    message: str
    suggestion: str


def resolve_batch(batch: Batch, data_ranks: int, origins: Mapping[str, Origin] | None = None) -> BatchSizes:
    """Derive the batch sizes that are not given.

    Args:
        batch: the table.
        data_ranks: ranks that see different data.
        origins: where the given values come from, for the message.

    Raises:
        ConfigError: the given values contradict one another, or the total does not divide.
    """
    ranks = "1 rank" if data_ranks == 1 else f"{data_ranks} ranks"
    micro, accumulation, total = batch.micro, batch.accumulation, batch.total
    clash = _clash(batch, data_ranks, ranks)
    if clash is not None:
        where = (origins or {}).get("batch.total")
        problem = Problem(
            path="batch.total",
            message=clash.message,
            suggestion=clash.suggestion,
            where=where.text if where else "",
        )
        raise error("batch sizes", [problem])
    sources: dict[str, str] = {}
    unset: set[str] = set()
    if total is None:
        given = [f"batch.{key}" for key, value in (("micro", micro), ("accumulation", accumulation)) if value]
        micro, accumulation = micro or 1, accumulation or 1
        total = micro * accumulation * data_ranks
        sources["batch.total"] = " x ".join([*given, ranks])
        unset |= {f"batch.{key}" for key in ("micro", "accumulation")} - set(given)
    elif micro is None:
        if accumulation is None:
            unset.add("batch.accumulation")
        by = f"(batch.accumulation x {ranks})" if accumulation else ranks
        accumulation = accumulation or 1
        micro = total // (accumulation * data_ranks)
        sources["batch.micro"] = f"batch.total / {by}"
    elif accumulation is None:
        accumulation = total // (micro * data_ranks)
        sources["batch.accumulation"] = f"batch.total / (batch.micro x {ranks})"
    return BatchSizes(
        micro=micro,
        accumulation=accumulation,
        total=total,
        origins={path: derived(source) for path, source in sources.items()} | dict.fromkeys(sorted(unset), DEFAULT),
    )


def check_batch(batch: Batch, data_ranks: int | None = None) -> Clash | None:
    """Find a contradiction that holds for ``data_ranks``, or, when that is None, for any number of ranks."""
    if data_ranks is not None:
        return _clash(batch, data_ranks, "1 rank" if data_ranks == 1 else f"{data_ranks} ranks")
    if batch.total is None:
        return None
    product = (batch.micro or 1) * (batch.accumulation or 1)
    if batch.total % product == 0:
        return None
    return Clash(f"{_factors(batch)} = {product} does not divide total = {batch.total}", _totals(batch.total, product))


def _clash(batch: Batch, data_ranks: int, ranks: str) -> Clash | None:
    micro, accumulation, total = batch.micro, batch.accumulation, batch.total
    if total is None:
        return None
    product = (micro or 1) * (accumulation or 1) * data_ranks
    arithmetic = " x ".join(filter(None, [_factors(batch), ranks]))
    if not (micro and accumulation):
        if total % product == 0:
            return None
        return Clash(f"{arithmetic} = {product} does not divide total = {total}", _totals(total, product))
    if product == total:
        return None
    workable = [f"total = {product}"]
    if total % (micro * data_ranks) == 0:
        workable.append(f"accumulation = {total // (micro * data_ranks)}")
    if total % (accumulation * data_ranks) == 0:
        workable.append(f"micro = {total // (accumulation * data_ranks)}")
    return Clash(f"{arithmetic} = {product}, but total = {total}", _or(workable))


def _factors(batch: Batch) -> str:
    given = (("micro", batch.micro), ("accumulation", batch.accumulation))
    return " x ".join(f"{name} {value}" for name, value in given if value)


def _totals(total: int, product: int) -> str:
    below = total // product * product
    return _or([f"total = {value}" for value in (below, below + product) if value])


def _or(choices: list[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)
