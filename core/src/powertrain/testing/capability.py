"""How a contract says that it does not apply."""

from __future__ import annotations

import pytest


def needs(fulfilled: bool, reason: str) -> None:
    """Skip the running test with ``reason`` unless ``fulfilled``."""
    if not fulfilled:
        pytest.skip(reason)
