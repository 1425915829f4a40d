"""Fixtures for every package's tests."""

from __future__ import annotations

pytest_plugins = ["powertrain.testing.pytest_plugin"]
