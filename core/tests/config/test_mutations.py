"""A misspelt key never passes: each one-character mutation of each legal key is rejected with the right suggestion."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

import pytest

from powertrain.config import read, structure
from powertrain.config.converter import make_converter
from powertrain.config.mismatch import Mismatches
from powertrain.config.options import all_options
from powertrain.config.record import keys, open_field, table
from powertrain.config.tables import CORE_TABLES
from powertrain.discovery import installed, load
from powertrain.errors import ConfigError

FEWER = 13
"""Of mutations of a key that is seen again, one in so many is tried."""

LETTERS = string.ascii_lowercase + string.digits + "-_"


def plugin_tables() -> dict[str, type[Any]]:
    return {name: load(name).Config for name in installed() if name not in CORE_TABLES}


def variants(kind: type[Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield each ``name`` that decides what a table takes, and the keys that are legal then."""
    rest = open_field(kind)
    if rest is None:
        yield "", list(keys(kind))
    else:
        for name, options in all_options({})[rest.metadata["open"]].items():
            yield name, [*keys(kind), *keys(options)]


def mutations(word: str) -> set[str]:
    cuts = range(len(word))
    deleted = {word[:i] + word[i + 1 :] for i in cuts}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in cuts[:-1]}
    replaced = {word[:i] + letter + word[i + 1 :] for i in cuts for letter in LETTERS}
    inserted = {word[:i] + letter + word[i:] for i in range(len(word) + 1) for letter in LETTERS}
    return (deleted | swapped | replaced | inserted) - {word, ""}


@pytest.mark.parametrize("section", sorted({*CORE_TABLES, *installed()}))
def test_each_mutation_of_a_key_is_rejected(section: str) -> None:
    """Every mutation is an unknown key at its own path, and the suggestion names the original."""
    kind = {**plugin_tables(), **CORE_TABLES}[section]
    options = all_options({})
    converter = make_converter(options)
    seen: set[str] = set()
    for name, legal in variants(kind):
        for word in legal:
            wrongs = sorted(mutations(word) - {*legal, "enabled"})
            assert len(wrongs) >= 4 * len(word)
            # A key that another name takes as well ("lr") was tried whole there; beside other keys, a part will do.
            for wrong in wrongs[:: FEWER if word in seen else 1]:
                # What `structure` does for one section, without making all the other sections each time.
                content = {wrong: 1, **({"name": name} if name and word != "name" else {})}
                with pytest.raises(Mismatches) as error:
                    table(converter, options, content, kind, ("enabled",))
                (item,) = (item for item in error.value.items if item.path == (wrong,))
                assert item.message == "unknown key"
                assert word in item.keys
            seen.add(word)


def test_a_misspelt_key_is_told_with_its_whole_path() -> None:
    """What is found in a table becomes a problem at the full path, and the suggestion is a full path too."""
    for section, kind in {**plugin_tables(), **CORE_TABLES}.items():
        for word in keys(kind):
            wrong = word + "q"
            with pytest.raises(ConfigError) as error:
                structure(read({section: {wrong: 1}}, environ={}), plugin_tables())
            (problem,) = (item for item in error.value.problems if item.path == f"{section}.{wrong}")
            assert problem.message == "unknown key"
            assert f"{section}.{word}" in problem.suggestion.replace(" or ", ", ").split(", ")


@pytest.mark.parametrize("section", list(CORE_TABLES))
def test_each_mutation_of_a_section_is_rejected(section: str) -> None:
    """Every mutation of a section's name is an unknown section, and the suggestion names the original."""
    schemas = plugin_tables()
    for wrong in mutations(section) - {*schemas, *CORE_TABLES}:
        with pytest.raises(ConfigError) as error:
            structure(read({wrong: {}}, environ={}), schemas)
        # A plugin's table that is absent although it has required keys is a problem of its own here.
        (problem,) = (item for item in error.value.problems if item.message == "unknown section")
        assert f"[{section}]" in problem.suggestion


@pytest.mark.parametrize("kind", ["optimizer", "scheduler"])
def test_each_mutation_of_a_name_is_rejected(kind: str) -> None:
    """Every mutation of an optimizer's or schedule's name is rejected, and the suggestion names the original."""
    names = all_options({})[kind]
    for name in names:
        for wrong in mutations(name) - set(names):
            with pytest.raises(ConfigError) as error:
                structure(read({kind: {"name": wrong}}, environ={}), {})
            found = [problem for problem in error.value.problems if problem.path == f"{kind}.name"]
            assert f'"{name}"' in found[0].suggestion
