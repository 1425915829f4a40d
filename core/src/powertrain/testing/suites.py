"""The contracts, run on an installed plugin: ``powertrain plugins test NAME``.

That command is::

    pytest -p powertrain.testing.pytest_plugin --pyargs powertrain.testing.suites --plugin NAME

The plugin has its default table, changed by each ``--plugin-set KEY=VALUE``.
Classes whose hook it does not implement are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch

from powertrain import config as configuration
from powertrain.context import Context
from powertrain.discovery import load, schemas_for
from powertrain.environment import Rank
from powertrain.mesh import Mesh
from powertrain.plugin import Plugin
from powertrain.registry import Registry
from powertrain.roles.accelerator import Accelerator
from powertrain.roles.checkpoint import CheckpointStore
from powertrain.roles.communicator import Communicator
from powertrain.roles.files import FileEngine
from powertrain.roles.optimizer import OptimizerWrapper
from powertrain.roles.sampler import Sampler
from powertrain.roles.tier import Category, Tier
from powertrain.testing.accelerator import AcceleratorContract
from powertrain.testing.capability import needs
from powertrain.testing.checkpoint import CheckpointStoreContract
from powertrain.testing.collectives import connected
from powertrain.testing.communicator import Check, CommunicatorContract, PooledCommunicatorContract
from powertrain.testing.files import FileEngineContract
from powertrain.testing.loopback import LoopbackWorld
from powertrain.testing.null import NullCommunicator, NullHost
from powertrain.testing.optimizer import OptimizerWrapperContract
from powertrain.testing.plugin import PluginContract
from powertrain.testing.sampler import SamplerContract
from powertrain.testing.surroundings import make_context
from powertrain.testing.tier import TierContract

TIMEOUT = 60.0
"""Seconds that a communicator under test may take for one collective."""


def registry_of(name: str, settings: Sequence[str] = ()) -> Registry:
    """Return a registry that holds the installed plugin ``name`` alone.

    Args:
        name: of the plugin, and of its table.
        settings: "key=value" of keys of the table that have not their defaults.

    Raises:
        ConfigError: the table does not take them.
    """
    plugin = load(name)
    if not settings:
        return Registry([plugin(plugin.Config())])
    document = configuration.read({name: {}}, overrides=[f"{name}.{setting}" for setting in settings], environ={})
    schemas = schemas_for(document, ())
    config = configuration.structure(document, schemas.tables, installed=schemas.installed, options=schemas.options)
    return Registry([plugin(config.tables[name])])


def connect(name: str, settings: Sequence[str], sizes: Mapping[str, int] | None) -> Communicator:
    """Connect this process as an engine would, with the communicator and wrappers of plugin ``name``."""
    rank = Rank.from_environment()
    mesh = Mesh.build(rank.world_size, rank.index, sizes)
    hooks = registry_of(name, settings)
    made: Communicator | None = hooks.one(
        "make_communicator", name=None, accelerator=NullHost(), mesh=mesh, rank=rank, timeout=TIMEOUT
    )
    if made is None:
        raise RuntimeError(f"plugin {name!r} made no communicator for the host's memory")
    return wrapped(hooks, name, made)


def wrapped(hooks: Registry, name: str, communicator: Communicator) -> Communicator:
    """Return ``communicator`` with what the plugin puts around it."""
    result: Communicator | None = hooks.call(
        name, "wrap_communicator", communicator=communicator, accelerator=NullHost(), timeout=TIMEOUT
    )
    return communicator if result is None else result


class Suite:
    """What all suites share: the plugin that the command line names.

    Attributes:
        role: what the table of results calls it.
        hooks: the plugin must implement one of these; any plugin when empty.
        unless: and none of these.
    """

    role: ClassVar[str]
    hooks: ClassVar[frozenset[str]] = frozenset()
    unless: ClassVar[frozenset[str]] = frozenset()
    name: str
    settings: tuple[str, ...]
    registry: Registry

    @pytest.fixture(autouse=True)
    def _take_plugin(self, request: pytest.FixtureRequest) -> None:
        self.name = request.config.getoption("--plugin")
        self.settings = tuple(request.config.getoption("--plugin-set"))
        self.registry = self.another()

    def another(self) -> Registry:
        """Return a registry with a new object of the plugin."""
        return registry_of(self.name, self.settings)


class TestPlugin(Suite, PluginContract):
    """Any plugin."""

    role = "plugin"

    def plugin(self) -> type[Plugin[Any]]:
        """Return the installed plugin's class."""
        return load(self.name)


class TestAccelerator(Suite, AcceleratorContract):
    """A plugin that makes an accelerator of its own name."""

    role, hooks = "accelerator", frozenset({"make_accelerator"})

    def make(self) -> Accelerator:
        """Return the plugin's accelerator, where it can be used."""
        probe = self.registry.plugins[self.name].is_available()
        needs(probe.available, f"it cannot be used here: {probe.reason}")
        made: Accelerator | None = self.registry.one("make_accelerator", name=self.name)
        assert made is not None, f"plugin {self.name!r} makes no accelerator of its own name"
        return made

    def test_declines_other_names(self) -> None:
        """An accelerator of another name is somebody else's."""
        assert self.registry.one("make_accelerator", name="somebody else's") is None


class TestCommunicator(Suite, PooledCommunicatorContract):
    """A plugin that connects processes."""

    role, hooks = "communicator", frozenset({"make_communicator"})

    def connector(self) -> Callable[[Mapping[str, int] | None], Communicator]:
        """Return what connects one process."""
        return partial(connect, self.name, self.settings)


class TestCommunicatorWrapper(Suite, CommunicatorContract):
    """A plugin that wraps whatever connects the ranks."""

    role, hooks, unless = "communicator", frozenset({"wrap_communicator"}), frozenset({"make_communicator"})

    def on_ranks(self, n: int, check: Check, *args: Any, sizes: Mapping[str, int] | None = None) -> list[Any]:
        """Run ``check`` in threads, on wrapped loop-back communicators."""

        def body(communicator: Communicator) -> Any:
            hooks = self.another()
            return connected(lambda _: wrapped(hooks, self.name, communicator), None, check, args)

        return LoopbackWorld(n, sizes).run(body)


class TestOptimizerWrapper(Suite, OptimizerWrapperContract):
    """A plugin that takes gradients to updated parameters."""

    role, hooks = "optimizer", frozenset({"wrap_optimizer"})

    def make(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, context: Context) -> OptimizerWrapper:
        """Return the plugin's wrapper."""
        made: OptimizerWrapper | None = self.another().one(
            "wrap_optimizer", model=model, optimizer=optimizer, context=context
        )
        needs(made is not None, "its table wraps no optimizer")
        assert made is not None
        return made


class TestCheckpointStore(Suite, CheckpointStoreContract):
    """A plugin that keeps checkpoints."""

    role, hooks = "checkpoint", frozenset({"make_checkpoint_store"})

    def make(self, directory: Path, communicator: Communicator) -> CheckpointStore:
        """Return the plugin's store of a directory."""
        made: CheckpointStore | None = self.another().one(
            "make_checkpoint_store", uri=str(directory), context=make_context(communicator)
        )
        needs(made is not None, "it keeps no checkpoints in plain directories")
        assert made is not None
        return made


class TestSampler(Suite, SamplerContract):
    """A plugin that chooses samples."""

    role, hooks = "sampler", frozenset({"make_sampler"})

    def make(self, length: int, total: int, index: int, size: int, seed: int) -> Sampler:
        """Return the plugin's sampler over a dataset of ``length``."""
        communicator = NullCommunicator(Mesh.build(size, index), torch.device("cpu"))
        context = make_context(communicator, {"batch": {"total": total}, "run": {"seed": seed}})
        made: Sampler | None = self.registry.one("make_sampler", dataset=range(length), context=context)
        needs(made is not None, "it declines a dataset of integers")
        assert made is not None
        return made


class TestTier(Suite, TierContract):
    """A plugin that lets state rest elsewhere, category by category."""

    role, hooks = "tier", frozenset({"make_tier"})
    category: Category

    @pytest.fixture(autouse=True, params=get_args(Category))
    def _take_category(self, request: pytest.FixtureRequest) -> None:
        self.category = request.param

    def make(self, directory: Path) -> Tier:
        """Return where the plugin lets the category rest."""
        context = make_context(NullCommunicator(Mesh.build(1, 0), torch.device("cpu")))
        made: Tier | None = self.another().one("make_tier", category=self.category, context=context)
        needs(made is not None, f"its table leaves {self.category} on the device")
        assert made is not None
        return made


class TestFileEngine(Suite, FileEngineContract):
    """A plugin that moves bytes between memory and files."""

    role, hooks = "files", frozenset({"make_file_engine"})

    def make(self) -> FileEngine:
        """Return the plugin's engine, as a command gets it."""
        made: FileEngine | None = self.registry.one("make_file_engine", context=None)
        needs(made is not None, "its table makes no engine")
        assert made is not None
        return made
