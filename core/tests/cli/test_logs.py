"""What is logged, where, and by which rank."""

from __future__ import annotations

import logging

import pytest

from powertrain import logs
from powertrain.errors import LaunchError


@pytest.fixture(autouse=True)
def no_level(monkeypatch):
    """Leave the level to the test."""
    monkeypatch.delenv("POWERTRAIN_LOG", raising=False)


def spoken(capsys) -> list[str]:
    """Log one message of each level and return what reached standard error."""
    logger = logging.getLogger("powertrain.engine")
    for level in ("debug", "info", "warning", "error"):
        getattr(logger, level)("a %s", level)
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err.splitlines()


def test_rank_zero_speaks_for_all(capsys):
    """Rank 0 shows INFO and above; another rank only warnings, marked with its number."""
    logs.configure(0)
    assert len(spoken(capsys)) == 3
    logs.configure(3)
    lines = spoken(capsys)
    assert len(lines) == 2 and all(line.startswith("[rank 3] ") for line in lines)


def test_configuring_twice_says_nothing_twice(capsys):
    """Calling it again replaces the handler, so no line is doubled."""
    logs.configure(0)
    logs.configure(0)
    assert len(spoken(capsys)) == 3


@pytest.mark.parametrize(
    ("level", "first", "other"), [("debug", 4, 4), ("info", 3, 2), ("warning", 2, 2), ("error", 1, 1)]
)
def test_variable_sets_the_level(monkeypatch, capsys, level, first, other):
    """POWERTRAIN_LOG sets the level of rank 0 and caps the others; debug opens all."""
    monkeypatch.setenv("POWERTRAIN_LOG", level)
    logs.configure(0)
    assert len(spoken(capsys)) == first
    logs.configure(1)
    assert len(spoken(capsys)) == other


def test_unknown_level_is_refused(monkeypatch):
    """A level that does not exist is an error that lists those that do."""
    monkeypatch.setenv("POWERTRAIN_LOG", "loud")
    with pytest.raises(LaunchError, match="debug, info, warning, error"):
        logs.configure(0)
