"""The scanner finds every key of any document that tomli accepts."""

from __future__ import annotations

import json
from typing import Any

import tomli
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from powertrain.config.origin import Path
from powertrain.config.positions import positions

SCALARS = [
    "1",
    "-2.5e3",
    "0xdead_beef",
    "true",
    "inf",
    "1979-05-27 07:32:00",
    "1979-05-27T00:32:00.999-07:00",
    "1979-05-27",
    "07:32:00",
    '""',
    '"a # b ] } , = \\" c \\\\"',
    "'it # ] } = \\'",
    '"""\nmulti ] # "" line\\""""',
    '""""quoted"""""',
    '""""""',
    "''''single' ''''",
    "'''\n[not.a.table]\nx = 1\n'''",
]
NAMES = ["a", "b", "key", "two-part", "under_score", "7", "with space", "dot.ted", 'q"uote', "ünï", "a#b", ""]


class Writer:
    """Writes a document and notes where it put each key and element."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.text = ""
        self.places: dict[Path, tuple[int, int]] = {}

    def mark(self, path: Path) -> None:
        line = self.text.count("\n") + 1
        self.places.setdefault(path, (line, len(self.text) - (self.text.rfind("\n") + 1) + 1))

    def choose(self, choices: list[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def key(self, name: str) -> None:
        spellings = [json.dumps(name, ensure_ascii=False)]
        if name and name.replace("-", "").replace("_", "").isalnum() and name.isascii():
            spellings.append(name)
        if "'" not in name:
            spellings.append(f"'{name}'")
        self.text += self.choose(spellings)

    def dotted(self, prefix: Path, names: list[str]) -> Path:
        for index, name in enumerate(names):
            prefix = (*prefix, name)
            if index:
                self.text += self.choose([".", " . "])
            self.mark(prefix)
            self.key(name)
        return prefix

    def end(self) -> None:
        self.text += self.choose(["", "  ", " # x = ["]) + self.choose(["\n", "\n\n", "\n# note [x]\n", "\n \t\n"])

    def pairs(self, prefix: Path) -> None:
        for name in self.draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3)):
            self.text += self.choose(["", "  "])
            names = [name, *self.draw(st.lists(st.sampled_from(NAMES), max_size=2))]
            path = self.dotted(prefix, names)
            self.text += self.choose(["=", " = "])
            self.value(path, 0)
            self.end()

    def value(self, path: Path, depth: int) -> None:
        kind = self.choose(["scalar", "scalar", "array", "table"]) if depth < 3 else "scalar"
        if kind == "scalar":
            self.text += self.choose(SCALARS)
        elif kind == "array":
            blanks = ["", " ", "\n", " # in [ here\n  "]
            self.text += "["
            count = self.draw(st.integers(0, 3))
            for index in range(count):
                self.text += self.choose(blanks)
                self.mark((*path, index))
                self.value((*path, index), depth + 1)
                self.text += self.choose(blanks) + ("," if index < count - 1 else self.choose(["", ","]))
            self.text += self.choose(blanks) + "]"
        else:
            self.text += "{" + self.choose(["", " "])
            for index, name in enumerate(self.draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))):
                self.text += ", " if index else ""
                inner = self.dotted(path, [name])
                self.text += " = "
                self.value(inner, depth + 1)
            self.text += self.choose(["", " "]) + "}"

    def header(self, *names: str) -> None:
        self.text += "[" + self.choose(["", " "])
        self.dotted((), list(names))
        self.text += self.choose(["", " "]) + "]"


@st.composite
def documents(draw: Any) -> tuple[str, dict[Path, tuple[int, int]]]:
    writer = Writer(draw)
    writer.text += writer.choose(["", "\n", "# first\n"])
    writer.pairs(())
    for number in range(draw(st.integers(0, 3))):
        path = (f"table {number}", "sub")[: draw(st.integers(1, 2))]
        writer.header(*path)
        writer.end()
        writer.pairs(path)
    for index in range(draw(st.integers(0, 3))):
        writer.text += "[["
        writer.mark(("list",))
        writer.mark(("list", index))
        writer.text += "list]]"
        writer.end()
        writer.pairs(("list", index))
        if draw(st.booleans()):
            writer.text += "[list."
            writer.mark(("list", index, "below it"))
            writer.text += "'below it']"
            writer.end()
            writer.pairs(("list", index, "below it"))
    return writer.text, writer.places


def paths(value: Any, path: Path = ()) -> set[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {path} if path else set()
    return found.union(*(paths(item, (*path, name)) for name, item in items))


@settings(max_examples=400, deadline=None)
@given(documents())
def test_every_key_is_found_where_it_was_written(document: tuple[str, dict[Path, tuple[int, int]]]) -> None:
    """Each table, key and element of a document has the line and column at which it was written."""
    text, places = document
    try:
        parsed = tomli.loads(text)
    except tomli.TOMLDecodeError:
        reject()  # two dotted keys clashed
    assert positions(text) == places
    assert set(places) == paths(parsed)


def test_windows_line_ends_do_not_shift_lines() -> None:
    """A file with CRLF line ends has the same positions as one with LF."""
    text = 'a = 1\n[t]\nb = """\nx\n"""\nc = 2\n'
    assert positions(text.replace("\n", "\r\n")) == positions(text)


def test_a_table_is_where_its_name_stands() -> None:
    """A header's parts and a dotted key's parts each have their own column."""
    assert positions("[zero.deep]\n  stage.x = 1\n") == {
        ("zero",): (1, 2),
        ("zero", "deep"): (1, 7),
        ("zero", "deep", "stage"): (2, 3),
        ("zero", "deep", "stage", "x"): (2, 9),
    }
