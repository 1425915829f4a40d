"""The operators that ``[recompute] save`` names, as torch knows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from powertrain.compat import operator_names
from powertrain.errors import ShardingError
from powertrain.text import did_you_mean
from powertrain_recompute.sets import ALIASES, SETS

DEFAULT = ("matmul", "attention")
"""What is kept where the configuration does not say: the operators that cost most for each byte of their results."""


def named(names: Sequence[str]) -> list[str]:
    """Return names without aliases and repetitions."""
    return list(dict.fromkeys(ALIASES.get(name, name) for name in names))


def operators(names: Sequence[str]) -> frozenset[Any]:
    """Return the operators of sets and of single names.

    Raises:
        ShardingError: torch has none of a name.
    """
    found: set[Any] = set()
    for name in named(names):
        if name in SETS:
            found.update(operator for member in SETS[name] for operator in _overloads(member))
            continue
        overloads = list(_overloads(name))
        if not overloads:
            raise ShardingError(
                f"torch has no operator {name!r}{_meant(name)}",
                where="recompute.save",
                expected=f"one of {', '.join((*SETS, *ALIASES))}, or the name of an operator",
                found=repr(name),
                remedy="correct the name (torch.profiler shows those of a model, with :: for the first dot), or import "
                "the package that brings the operator before powertrain.initialize",
            )
        found.update(overloads)
    return frozenset(found)


def _meant(name: str) -> str:
    known = operator_names()
    if name.count(".") == 1:
        known = list(dict.fromkeys(entry.rpartition(".")[0] for entry in known))
    return did_you_mean(name, known)


def _overloads(name: str) -> Iterator[Any]:
    """Yield the overloads of ``namespace.operator``, or the one of ``namespace.operator.overload``."""
    namespace, operator, *overload = name.split(".")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    if packet is None:
        return
    if not hasattr(packet, "overloads"):  # an operator of higher order
        yield packet
        return
    for entry in overload or packet.overloads():
        if entry in packet.overloads():
            yield getattr(packet, entry)
