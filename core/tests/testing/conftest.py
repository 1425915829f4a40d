"""Runs a contract on an object without a second pytest."""

from __future__ import annotations

import inspect
import itertools
import tempfile
from pathlib import Path

import pytest


def cases(function):
    """Return the arguments of each case of a parametrized test."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    columns = []
    for mark in marks:
        names, values = mark.args
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        columns.append([dict(zip(names, value if len(names) > 1 else [value], strict=True)) for value in values])
    for combination in itertools.product(*columns):
        yield {name: value for part in combination for name, value in part.items()}


class Contract:
    """Runs the tests of one contract class."""

    def failures(self, contract, only=None):
        """Return (test, error) of each test that fails, of all or of the one called ``only``."""
        found = []
        for name, function in inspect.getmembers(contract, inspect.isfunction):
            if not name.startswith("test_") or only not in (None, name):
                continue
            for arguments in cases(function):
                with tempfile.TemporaryDirectory() as directory:
                    if "tmp_path" in inspect.signature(function).parameters:
                        arguments["tmp_path"] = Path(directory)
                    try:
                        function(contract(), **arguments)
                    except pytest.skip.Exception:
                        continue
                    except (Exception, pytest.fail.Exception) as error:
                        found.append((name, error))
        return found


@pytest.fixture
def contract():
    """Run contracts within a test."""
    return Contract()
