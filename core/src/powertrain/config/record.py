"""Turns one TOML table into an object of the attrs class that describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, get_type_hints

import attrs
import cattrs

from powertrain.config import words
from powertrain.config.constraints import Constraint, constraints
from powertrain.config.constraints import words as constraint_words
from powertrain.config.mismatch import Collector, Mismatch, Mismatches, attempt, not_a_choice, wrong_type
from powertrain.config.suggest import nearest
from powertrain.errors import PluginBroken

Options = Mapping[str, Mapping[str, type[Any]]]
"""Kind of an open table ("optimizer") to name ("adamw") to the attrs class of its options."""

Fields = Mapping[str, "attrs.Attribute[Any]"]


def type_hints(kind: type[Any]) -> dict[str, Any]:
    """Return the types of a table's fields.

    Raises:
        PluginBroken: a type is imported under TYPE_CHECKING only, or does not exist.
    """
    try:
        return get_type_hints(kind)
    except (NameError, TypeError) as exception:
        raise PluginBroken(
            f"the field types of {kind.__module__}.{kind.__qualname__} cannot be resolved: {exception}",
            remedy="import the types of a configuration class at run time, not under TYPE_CHECKING",
        ) from exception


def keys(kind: type[Any]) -> dict[str, attrs.Attribute[Any]]:
    """Return the keys that a table of this class may hold by name, without the options of an open one."""
    return {field.name: field for field in attrs.fields(kind) if field.init and "open" not in field.metadata}


def open_field(kind: type[Any]) -> attrs.Attribute[Any] | None:
    """Return the field that takes the remaining keys of the table, if the class has one."""
    return next((field for field in attrs.fields(kind) if "open" in field.metadata), None)


def expected(field: attrs.Attribute[Any], kind: Any) -> str:
    """Describe what a field takes: "an integer >= 1"."""
    return f"{words.of_type(kind)} {constraint_words(field.validator)}".strip()


def table(converter: cattrs.Converter, options: Options, value: Any, kind: type[Any], also: Sequence[str] = ()) -> Any:
    """Make an attrs object of a table.

    Args:
        converter: structures the values.
        options: the classes of the options that an open table may hold.
        value: the table.
        kind: the attrs class.
        also: legal keys that the class does not hold, for suggestions.

    Raises:
        Mismatches: everything that is wrong in the table.
    """
    if not isinstance(value, dict):
        raise Mismatches([wrong_type(value, kind)])
    fields, rest = keys(kind), open_field(kind)
    if not value and rest is None and all(field.default is not attrs.NOTHING for field in fields.values()):
        return kind()  # most sections of most files: resolving their types would be most of the work
    hints = type_hints(kind)
    collector, values = Collector(), {}
    others = {}
    for name, item in value.items():
        if name in fields:
            before = len(collector.items)
            made = collector.structure(name, converter.structure, item, hints[name])
            if len(collector.items) == before:
                values[name] = made
            elif collector.items[before].path == (name,) and collector.items[before].message == "wrong type":
                full = expected(fields[name], hints[name])
                collector.items[before] = attrs.evolve(collector.items[before], expected=full)
        else:
            others[name] = item
    if rest is None:
        collector.items += [_unknown_key(name, [*fields, *also]) for name in others]
    else:
        name = _default(fields["name"]) if "name" not in value else values.get("name")
        choice = Choice(name=name, known=options.get(rest.metadata["open"], {}), siblings=(*fields, *also))
        values[rest.name], wrong = attempt(lambda extra, _: choice.structure(converter, options, extra), others, None)
        collector.items += wrong
    collector.items += [
        Mismatch(path=(name,), message="required key is missing", expected=expected(field, hints[name]))
        for name, field in fields.items()
        if name not in value and field.default is attrs.NOTHING
    ]
    collector.items += _broken_constraints(fields, hints, value, values)
    collector.finish()
    aliases = {field.name: field.alias for field in attrs.fields(kind)}
    try:
        return kind(**{aliases[name]: item for name, item in values.items()})
    except (ValueError, TypeError) as exception:
        raise Mismatches([Mismatch(message=_first_word(exception))]) from None


@attrs.frozen(kw_only=True)
class Choice:
    """What the ``name`` of an open table chose, which decides what its remaining keys may be.

    Attributes:
        name: the name, or None where the table has one that is no string.
        known: the attrs classes of the options, by name.
        siblings: the keys that the table takes whatever the name.
    """

    name: str | None
    known: Mapping[str, type[Any]]
    siblings: Sequence[str]

    def structure(self, converter: cattrs.Converter, options: Options, extra: dict[str, Any]) -> dict[str, Any]:
        """Check the remaining keys; a dotted path's are left to whoever imports it."""
        if self.name is not None and self.name in self.known:
            kind = self.known[self.name]
            made = table(converter, options, extra, kind, self.siblings)
            return {key: getattr(made, key) for key in keys(kind)}
        if self.name is not None and "." not in self.name:
            wrong = not_a_choice(self.name, list(self.known), ["a dotted path"])
            raise Mismatches([attrs.evolve(wrong, path=("name",))])
        return extra


def _unknown_key(name: str, legal: Sequence[str]) -> Mismatch:
    near = tuple(nearest(name, legal))
    choices = None if near else f"one of {', '.join(legal)}" if legal else "no key at all"
    return Mismatch(path=(name,), message="unknown key", keys=near, expected=choices)


def _broken_constraints(
    fields: Fields, hints: Mapping[str, Any], given: Mapping[str, Any], values: Mapping[str, Any]
) -> list[Mismatch]:
    """Run the validators one by one, so that each that fails is told, not only the first."""
    defaults = {name: _default(field) for name, field in fields.items() if name not in given}
    known = {name: value for name, value in {**defaults, **values}.items() if value is not attrs.NOTHING}
    instance = SimpleNamespace(**known)
    mismatches = []
    for name in (name for name in fields if name in values):
        for constraint in constraints(fields[name].validator):
            reason = _breach(constraint, instance, fields[name], values[name])
            if reason is None:
                continue
            if constraint.words:
                demand, found = expected(fields[name], hints[name]), words.of_value(_listed(values[name]))
                mismatches.append(Mismatch(path=(name,), message="out of range", expected=demand, found=found))
            else:
                mismatches.append(Mismatch(path=(name,), message=reason))
    return mismatches


def _breach(constraint: Constraint, instance: Any, field: attrs.Attribute[Any], value: Any) -> str | None:
    """Return why a value does not meet a constraint, or None when it does."""
    try:
        constraint.check(instance, field, value)
    except AttributeError:
        return None  # it compares with a field that is missing or itself wrong
    except (ValueError, TypeError) as exception:
        return _first_word(exception)
    return None


def _first_word(exception: Exception) -> str:
    return str(exception.args[0] if exception.args else exception)


def _default(field: attrs.Attribute[Any]) -> Any:
    default: Any = field.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return attrs.NOTHING if default.takes_self else default.factory()
    return default


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
