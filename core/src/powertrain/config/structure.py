"""Checks a document against the schemas of its sections and makes the effective configuration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import attrs

from powertrain.config import words
from powertrain.config.batch import check_batch
from powertrain.config.converter import make_converter
from powertrain.config.document import ENABLED, Document
from powertrain.config.effective import Config, leaves, plain
from powertrain.config.mismatch import Mismatch, Mismatches
from powertrain.config.options import all_options
from powertrain.config.origin import DEFAULT, Origin, Path, dotted
from powertrain.config.problem import Problem, error
from powertrain.config.record import Options, keys, open_field, table
from powertrain.config.suggest import nearest
from powertrain.config.tables import CORE_TABLES

Lookup = Callable[[str], list[str]]

MORE_OPTIMIZERS = "optimizers"
"""The section, and plugin, that adds optimizers to torch's own."""


def structure(
    document: Document,
    schemas: Mapping[str, type[Any]],
    *,
    installed: Collection[str] = (),
    options: Options | None = None,
    data_ranks: int | None = None,
) -> Config:
    """Make the effective configuration, or tell everything that is wrong at once.

    Args:
        document: what ``read`` returned.
        schemas: section to attrs class, for the plugins that take part. The core's own tables are known.
        installed: names of installed plugins, whose sections are legal though they may not take part.
        options: what plugins add to the open tables: kind to name to the attrs class of the options.

        data_ranks: ranks that see different data, for the batch sizes; None when not known yet.

    Raises:
        ConfigError: ``problems`` holds a ``Problem`` for each thing that is wrong.
    """
    every = {**schemas, **CORE_TABLES}
    known_options = all_options(options or {})
    converter = make_converter(known_options)
    elsewhere = _elsewhere(every, known_options)
    problems: list[Problem] = list(_unknown_sections(document, every, installed))
    made: dict[str, Any] = {}
    for section, kind in every.items():
        content = document.raw.get(section, {})
        if not isinstance(content, dict):
            expected = f"a table [{section}]"
            problems.append(document.problem((section,), "wrong type", expected=expected, found=words.found(content)))
            continue
        problems += _switch_problems(document, section, content)
        keys_only = {name: value for name, value in content.items() if name != ENABLED}
        try:
            value = table(converter, known_options, keys_only, kind, (ENABLED,))
        except Mismatches as mismatches:
            problems += [_problem(document, section, item, elsewhere, installed) for item in mismatches.items]
        else:
            made[section] = value
    if "batch" in made and (clash := check_batch(made["batch"], data_ranks)) is not None:
        problems.append(document.problem(("batch", "total"), clash.message, suggestion=clash.suggestion))
    if problems:
        raise error(document.name, sorted(problems, key=_place))
    core = {section: kind() if section in document.disabled else made[section] for section, kind in CORE_TABLES.items()}
    tables = {section: made[section] for section in document.sections if section in made and section not in core}
    config = Config(name=document.name, tables=tables, **core)
    return attrs.evolve(config, origins=dict(_origins(config, document)))


def _switch_problems(document: Document, section: str, content: Mapping[str, Any]) -> Iterator[Problem]:
    switch = content.get(ENABLED, True)
    if not isinstance(switch, bool):
        suggestion = switch if switch in ("true", "false") else None
        found = words.found(switch)
        path = (section, ENABLED)
        yield document.problem(path, "wrong type", expected="true or false", found=found, suggestion=suggestion)


def _unknown_sections(
    document: Document, known: Mapping[str, type[Any]], installed: Collection[str]
) -> Iterator[Problem]:
    plugins = document.raw.get("plugins")
    listed = plugins.get("disable") if isinstance(plugins, dict) else None
    off = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    legal = {*known, *installed, *document.disabled, *off}
    for name, content in document.raw.items():
        if name in legal:
            continue
        if not isinstance(content, dict):
            owners = [
                section for section, kind in known.items() if section in CORE_TABLES and name in attrs.fields_dict(kind)
            ]
            yield document.problem(
                (name,),
                "a key outside of any section",
                suggestion=f"{owners[0]}.{name}" if owners else _sections(name, {*known, *installed}),
            )
            continue
        near = _sections(name, {*known, *installed})
        remedy = "" if near else f"; no installed plugin provides it: pip install powertrain-{name.replace('_', '-')}"
        yield document.problem((name,), f"unknown section{remedy}", suggestion=near)


def _sections(name: str, legal: Collection[str]) -> str | None:
    near = nearest(name, sorted(legal))
    return words.either([f"[{section}]" for section in near]) if near else None


def _elsewhere(schemas: Mapping[str, type[Any]], options: Options) -> Lookup:
    """Return a function that finds the full paths at which a key of exactly this name is legal."""

    def lookup(name: str) -> list[str]:
        paths = []
        for section, kind in schemas.items():
            rest = open_field(kind)
            classes = options.get(rest.metadata["open"], {}) if rest is not None else {}
            takers = [choice for choice, options_class in classes.items() if name in keys(options_class)]
            if name in keys(kind):
                paths.append(f"{section}.{name}")
            elif takers:
                whose = f" (of {words.either(takers)})" if len(takers) <= 3 else ""
                paths.append(f"{section}.{name}{whose}")
        return paths

    return lookup


def _problem(
    document: Document, section: str, item: Mismatch, elsewhere: Lookup, installed: Collection[str]
) -> Problem:
    path: Path = (section, *item.path)
    suggestion, expected = item.suggestion, item.expected
    if path == ("optimizer", "name") and item.message == "not one of the choices":
        expected = f"{expected}, or one that a plugin's section adds{_optimizers(document, installed)}"
    if item.keys:
        suggestion = words.either([dotted((*path[:-1], name)) for name in item.keys])
    elif item.message == "unknown key" and (paths := [p for p in elsewhere(str(path[-1])) if p != dotted(path)]):
        suggestion, expected = words.either(paths), None
    return document.problem(path, item.message, expected=expected, found=item.found, suggestion=suggestion)


def _optimizers(document: Document, installed: Collection[str]) -> str:
    """Return what to do for optimizers beyond torch's; nothing where their section is there."""
    if MORE_OPTIMIZERS in document.sections:
        return ""
    install = "" if MORE_OPTIMIZERS in installed else f"pip install powertrain-{MORE_OPTIMIZERS} and "
    return f" ({install}add the section [{MORE_OPTIMIZERS}])"


def _place(problem: Problem) -> tuple[int, int]:
    """Order problems as the file does; those from other layers come first."""
    numbers = [int(part) for part in problem.where.split(":")[-2:] if part.isdecimal()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def _origins(config: Config, document: Document) -> Iterator[tuple[str, Origin]]:
    written = {dotted(path): origin for path, origin in document.origins.items() if path[0] not in document.disabled}
    for path, _ in leaves(plain(config.effective())):
        yield path, written.get(path, DEFAULT)
