"""Finds the line and column of every key of a TOML document.

tomli says what a document means, not where. This scanner walks a document that
tomli has accepted, so it checks nothing: it only has to tell where tokens end.
"""

from __future__ import annotations

import re
from bisect import bisect_right

import tomli

from powertrain.config.origin import Path

_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'",
    re.DOTALL,
)
# Numbers, booleans and dates (which may hold a space) end at the first of these.
_SCALAR = re.compile(r"[^,\]}#\n]+")


def positions(text: str) -> dict[Path, tuple[int, int]]:
    """Map the path of every table, key and array element to its line and column, both counted from 1.

    A key's position is that of its own part of a dotted key; a table's that of its part of the header which
    first names it; an array element's that of its value.

    Args:
        text: a document that tomli parses.
    """
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[Path, int] = {}
        self.lengths: dict[Path, int] = {}

    def scan(self) -> dict[Path, tuple[int, int]]:
        table: Path = ()
        self._skip(_BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)
        starts = [0] + [match.end() for match in re.finditer("\n", self.text)]
        return {path: _line_and_column(starts, offset) for path, offset in self.found.items()}

    def _header(self) -> Path:
        is_array = self.text.startswith("[[", self.at)
        brackets = 2 if is_array else 1
        self.at += brackets
        parts = self._key()
        self.at += brackets
        path: Path = ()
        for index, (name, offset) in enumerate(parts):
            path = (*path, name)
            self.found.setdefault(path, offset)
            last = index == len(parts) - 1
            if last and is_array:
                self.lengths[path] = self.lengths.get(path, 0) + 1
            if path in self.lengths:
                path = (*path, self.lengths[path] - 1)
                self.found.setdefault(path, offset)
        return path

    def _pair(self, table: Path) -> None:
        path = table
        for name, offset in self._key():
            path = (*path, name)
            self.found.setdefault(path, offset)
        self.at += 1  # the equals sign, or the key would not have ended
        self._skip(_SPACE)
        self._value(path)

    def _key(self) -> list[tuple[str, int]]:
        """Read a dotted key and the space around it; return its parts and where each begins."""
        parts = []
        while True:
            self._skip(_SPACE)
            begin = self.at
            if self.text[begin] in "\"'":
                token = self._skip(_STRING)
                name = tomli.loads(f"key = {token}")["key"]
            else:
                name = self._skip(_BARE_KEY)
            parts.append((name, begin))
            self._skip(_SPACE)
            if self.text[self.at] != ".":
                return parts
            self.at += 1

    def _value(self, path: Path) -> None:
        opening = self.text[self.at]
        if opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline_table(path)
        elif opening in "\"'":
            self._skip(_STRING)
        else:
            self._skip(_SCALAR)

    def _array(self, path: Path) -> None:
        index = 0
        self.at += 1
        while self._next_item("]"):
            place = (*path, index)
            self.found[place] = self.at
            self._value(place)
            index += 1

    def _inline_table(self, path: Path) -> None:
        self.at += 1
        while self._next_item("}"):
            self._pair(path)

    def _next_item(self, closing: str) -> bool:
        self._skip(_BLANK)
        if self.text[self.at] == ",":
            self.at += 1
            self._skip(_BLANK)
        if self.text[self.at] != closing:
            return True
        self.at += 1
        return False

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        assert match is not None, f"not TOML at offset {self.at}"
        self.at = match.end()
        return match.group()


def _line_and_column(starts: list[int], offset: int) -> tuple[int, int]:
    line = bisect_right(starts, offset)
    return line, offset - starts[line - 1] + 1
