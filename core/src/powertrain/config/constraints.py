"""Takes attrs validators apart: what each demands, in words and in JSON Schema.

attrs keeps its validator classes private but documents their construction; they
are recognised here by the attributes that hold what they were constructed with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import attrs
from attrs import validators

_OPTIONAL: Any = type(validators.optional(validators.ge(0)))
_BOUNDS = {">=": "minimum", ">": "exclusiveMinimum", "<=": "maximum", "<": "exclusiveMaximum"}


def finite(instance: Any, attribute: Any, value: Any) -> None:
    """Refuse an infinite number; what is no number passes."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be finite, not {value}")


def positive(instance: Any, attribute: Any, value: Any) -> None:
    """Refuse a number that is not above 0; unlike attrs' ``gt``, what is no number passes."""
    if isinstance(value, (int, float)) and not value > 0:
        raise ValueError(f"must be above 0, not {value}")


@attrs.frozen
class Constraint:
    """One demand on a value.

    Attributes:
        check: called as attrs calls a validator: instance, attribute, value; raises when it is not met.
        words: the demand, ready to follow a type: ">= 1"; empty when only the exception can tell.
        keywords: the same demand in JSON Schema.
    """

    check: Any
    words: str
    keywords: dict[str, Any]


def constraints(validator: Any) -> Iterator[Constraint]:
    """Yield the single demands that a field's validator is made of."""
    if validator is None:
        return
    if hasattr(validator, "_validators"):  # and_
        for part in validator._validators:
            yield from constraints(part)
    elif type(validator) is _OPTIONAL:
        for part in constraints(validator.validator):
            yield Constraint(_unless_none(part.check), part.words, part.keywords)
    elif hasattr(validator, "member_validator"):  # deep_iterable
        yield from constraints(validator.iterable_validator)
        each = words(validator.member_validator)
        items = {
            keyword: value
            for part in constraints(validator.member_validator)
            for keyword, value in part.keywords.items()
        }
        yield Constraint(validator, f"each {each}" if each else "", {"items": items} if items else {})
    else:
        yield _leaf(validator)


def words(validator: Any) -> str:
    """Return all demands in words, ready to follow a type: ">= 0 and < 10"."""
    return " and ".join(part.words for part in constraints(validator) if part.words)


def _leaf(validator: Any) -> Constraint:
    if validator is finite:
        return Constraint(validator, "finite", {})  # JSON has no other numbers
    if validator is positive:
        return Constraint(validator, "> 0", {"exclusiveMinimum": 0})
    if hasattr(validator, "compare_op"):
        operator, bound = validator.compare_op, validator.bound
        return Constraint(validator, f"{operator} {bound}", {_BOUNDS[operator]: bound})
    if hasattr(validator, "options"):
        options = list(validator.options)
        return Constraint(
            validator, "among " + ", ".join(json.dumps(option, default=str) for option in options), {"enum": options}
        )
    if hasattr(validator, "min_length"):
        return Constraint(validator, f"of at least {validator.min_length} items", {"minItems": validator.min_length})
    if hasattr(validator, "max_length"):
        return Constraint(validator, f"of at most {validator.max_length} items", {"maxItems": validator.max_length})
    if hasattr(validator, "pattern"):
        return Constraint(validator, f"matching {validator.pattern.pattern!r}", {"pattern": validator.pattern.pattern})
    return Constraint(validator, "", {})


def _unless_none(check: Any) -> Any:
    def checked(instance: Any, attribute: Any, value: Any) -> None:
        if value is not None:
            check(instance, attribute, value)

    return checked
