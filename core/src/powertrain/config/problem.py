"""One thing that is wrong with a configuration, in a person's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from powertrain.errors import ConfigError


@attrs.frozen(kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: the dotted path, empty when the whole document is meant.
        message: what kind of problem it is: "unknown key", "wrong type".
        where: ``file:line:column``, or the layer that set the value.
        expected: what would have been right.
        found: what was there instead.
        suggestion: what was probably meant.
    """

    path: str
    message: str
    where: str = ""
    expected: str | None = None
    found: str | None = None
    suggestion: str | None = None

    def __str__(self) -> str:
        clauses = [self.message]
        if self.expected and self.found:
            clauses.append(f"expected {self.expected}, found {self.found}")
        elif self.expected:
            clauses.append(f"expected {self.expected}")
        elif self.found:
            clauses.append(f"found {self.found}")
        if self.suggestion:
            clauses.append(f"did you mean {self.suggestion}?")
        place = f"{self.where}  " if self.where else ""
        subject = f"{self.path}: " if self.path else ""
        return place + subject + "; ".join(clauses)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are set, for JSON."""
        return {name: value for name, value in attrs.asdict(self).items() if value}


def error(name: str, problems: Sequence[Problem], *, remedy: str | None = None) -> ConfigError:
    """Make the one error that lists all problems of the configuration called ``name``."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError(f"{name}: {count}", problems=tuple(problems), remedy=remedy)
