"""Fixtures for every package's tests."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator

import pytest

pytest_plugins = ["powertrain.testing.pytest_plugin"]


def pytest_configure() -> None:
    """Heed interrupts: what a shell starts in the background ignores them, and processes under test inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def logger_restored() -> Iterator[None]:
    """Leave the logger as it was: a command that runs within a test takes its messages to standard error for good."""
    logger = logging.getLogger("powertrain")
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.propagate, logger.handlers = propagate, handlers
