"""The pytest side of ``powertrain.testing``: switch it on in a root ``conftest.py``.

::

    pytest_plugins = ["powertrain.testing.pytest_plugin"]

It adds the fixture ``ranks`` and the options ``--plugin`` and ``--plugin-set``
of ``powertrain.testing.suites``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from powertrain.testing.pool import RankPool

CONTRACTS = (
    "accelerator",
    "checkpoint",
    "collectives",
    "communicator",
    "files",
    "optimizer",
    "plugin",
    "sampler",
    "slices",
    "tier",
    "training",
)
pytest.register_assert_rewrite(*(f"powertrain.testing.{name}" for name in CONTRACTS))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Run functions as ranks: ``ranks(n, function, *args, **kwargs) -> [result of each rank]``."""
    from powertrain.testing.pool import RankPool

    with RankPool() as pool:
        yield pool


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--plugin`` and ``--plugin-set``."""
    group = parser.getgroup("powertrain")
    group.addoption("--plugin", metavar="NAME", help="the installed plugin that powertrain.testing.suites tests")
    group.addoption("--plugin-set", metavar="KEY=VALUE", action="append", default=[], help="a key of its table")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the suites of roles that the plugin does not fill."""
    of_suites = [item for item in items if getattr(item, "module", None) is not None and _is_suite(item)]
    if not of_suites:
        return
    name = config.getoption("--plugin")
    if name is None:
        raise pytest.UsageError("powertrain.testing.suites tests an installed plugin: add --plugin NAME")
    from powertrain.discovery import hooks_of, load

    hooks = set(hooks_of(load(name)))
    idle = [item for item in of_suites if not _applies(item, hooks)]
    items[:] = [item for item in items if item not in idle]
    config.hook.pytest_deselected(items=idle)


def _is_suite(item: pytest.Item) -> bool:
    return bool(getattr(item, "module").__name__ == "powertrain.testing.suites")  # noqa: B009


def _applies(item: pytest.Item, hooks: set[str]) -> bool:
    suite = getattr(item, "cls")  # noqa: B009
    return (not suite.hooks or bool(suite.hooks & hooks)) and not suite.unless & hooks
