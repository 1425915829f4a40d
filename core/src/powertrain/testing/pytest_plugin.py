"""The pytest side of ``powertrain.testing``: switch it on in a root ``conftest.py``.

::

    pytest_plugins = ["powertrain.testing.pytest_plugin"]
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from powertrain.testing.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Run functions as ranks: ``ranks(n, function, *args, **kwargs) -> [result of each rank]``."""
    with RankPool() as pool:
        yield pool
