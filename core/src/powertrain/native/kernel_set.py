"""What a plugin offers in C++, named without importing it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import attrs

from powertrain.native.source import Source


@attrs.frozen
class Finding:
    """What a test of one kernel found.

    Attributes:
        kernel: which.
        path: vector instructions that it ran with, or where it ran.
        cases: how many were tried.
        worst: the largest error, in units of what is allowed: 1 is just right.
    """

    kernel: str
    path: str
    cases: int
    worst: float

    @property
    def good(self) -> bool:
        """Whether every case was right; NaN is not."""
        return self.worst <= 1.0


@attrs.frozen
class KernelSet:
    """Kernels that are built together.

    Attributes:
        name: for people and commands.
        source: ``module:attribute`` of the ``Source``; the module should import no torch.
        check: ``module:function`` that tries every kernel against its reference and yields ``Finding``s.
    """

    name: str
    source: str
    check: str

    def load_source(self) -> Source:
        """Import what is built."""
        source = _load(self.source)
        assert isinstance(source, Source)
        return source

    def run_check(self) -> Iterator[Finding]:
        """Build it where it is not, and try every kernel."""
        yield from _load(self.check)()


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)
