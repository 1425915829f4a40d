"""Turns TOML values into typed ones, strictly, and finds every mismatch on the way.

cattrs chooses a hook for each type. Its own hooks coerce ("false" becomes True,
2.7 becomes 2), so the ones here replace them: a value is of the type or it is not;
only an integer may stand for a number.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import attrs
import cattrs

from powertrain.config import words
from powertrain.config.mismatch import Collector, Mismatch, Mismatches, attempt, not_a_choice, wrong_type
from powertrain.config.record import Options, table


def make_converter(options: Options) -> cattrs.Converter:
    """Return a strict converter; its ``structure`` raises ``Mismatches``.

    Args:
        options: the attrs classes of the options that open tables may hold.
    """
    converter = cattrs.Converter()
    for kind in (bool, int, float, str, pathlib.Path):
        converter.register_structure_hook(kind, _scalar)
    hooks: Sequence[tuple[Callable[[Any], bool], Callable[..., Any]]] = (
        (words.is_literal, _literal),
        (words.is_union, partial(_union, converter)),
        (words.is_list, partial(_list, converter)),
        (words.is_tuple, partial(_tuple, converter)),
        (words.is_dict, partial(_dict, converter)),
        (attrs.has, partial(table, converter, options)),
    )
    for applies, hook in hooks:
        converter.register_structure_hook_func(applies, hook)
    return converter


def _scalar(value: Any, kind: Any) -> Any:
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise Mismatches([wrong_type(value, kind)]) from None
    if kind is float and isinstance(value, float) and math.isnan(value):
        raise Mismatches([Mismatch(message="not a number", expected=words.of_type(kind), found="nan")])
    if kind is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    if type(value) is not kind:
        raise Mismatches([wrong_type(value, kind)])
    return value


def _literal(value: Any, kind: Any) -> Any:
    choices = get_args(kind)
    if not any(type(choice) is type(value) and choice == value for choice in choices):
        raise Mismatches([not_a_choice(value, choices)])
    return value


def _union(converter: cattrs.Converter, value: Any, kind: Any) -> Any:
    parts = [part for part in get_args(kind) if part is not type(None)]
    if value is None and len(parts) < len(get_args(kind)):
        return None
    failures: list[Sequence[Mismatch]] = []
    # An integer stays one where both integers and numbers are legal.
    for part in sorted(parts, key=lambda part: part is not type(value)):
        made, wrong = attempt(converter.structure, value, part)
        if not wrong:
            return made
        failures.append(wrong)
    if len(failures) == 1:
        raise Mismatches(failures[0])
    # Where one alternative has the value's shape, what is wrong inside it says more than the list of alternatives.
    for items in failures:
        if any(item.path for item in items):
            raise Mismatches(items)
    suggestions = [item.suggestion for items in failures for item in items if item.suggestion]
    mismatch = wrong_type(value, kind)
    raise Mismatches([attrs.evolve(mismatch, suggestion=next(iter(suggestions), mismatch.suggestion))])


def _items(converter: cattrs.Converter, value: Sequence[Any], kinds: Sequence[Any]) -> list[Any]:
    collector = Collector()
    pairs = zip(value, kinds, strict=True)
    items = [collector.structure(index, converter.structure, *pair) for index, pair in enumerate(pairs)]
    collector.finish()
    return items


def _list(converter: cattrs.Converter, value: Any, kind: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Mismatches([wrong_type(value, kind)])
    (item_kind,) = get_args(kind) or (Any,)
    return _items(converter, value, [item_kind] * len(value))


def _tuple(converter: cattrs.Converter, value: Any, kind: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise Mismatches([wrong_type(value, kind)])
    kinds = get_args(kind) or (Any, ...)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        found = f"{words.of_value(value)} ({len(value)} of them)"
        raise Mismatches([Mismatch(message="wrong length", expected=words.of_type(kind), found=found)])
    return tuple(_items(converter, value, kinds))


def _dict(converter: cattrs.Converter, value: Any, kind: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Mismatches([wrong_type(value, kind)])
    _, item_kind = get_args(kind) or (str, Any)
    collector = Collector()
    items = {name: collector.structure(name, converter.structure, item, item_kind) for name, item in value.items()}
    collector.finish()
    return items
