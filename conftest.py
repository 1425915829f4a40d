"""Fixtures for every package's tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

pytest_plugins = ["powertrain.testing.pytest_plugin"]


@pytest.fixture(autouse=True)
def logger_restored() -> Iterator[None]:
    """Leave the logger as it was: a command that runs within a test takes its messages to standard error for good."""
    logger = logging.getLogger("powertrain")
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.propagate, logger.handlers = propagate, handlers
