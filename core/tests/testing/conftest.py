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

    def failures(self, contract, *, stop=False):
        """Return (test, error) of each test that fails; only the first with ``stop``."""
        found = []
        for name, function in inspect.getmembers(contract, inspect.isfunction):
            if not name.startswith("test_"):
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
                        if stop:
                            return found
        return found

    def caught_by(self, contract):
        """Return the name of the first test that fails."""
        found = self.failures(contract, stop=True)
        assert found, "no test of the contract caught the fault"
        return found[0][0]


@pytest.fixture
def contract():
    """Run contracts within a test."""
    return Contract()
