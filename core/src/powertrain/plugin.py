"""What a plugin is: a class that owns one TOML table and implements hooks.

This module imports no torch, and neither may the module a plugin's entry point
names: listing and checking plugins must answer in a fraction of a second.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, get_args, get_origin

import attrs

if TYPE_CHECKING:
    from powertrain.native import KernelSet

API = 1
"""The plugin API this core serves. It serves ``API - 1`` as well."""


@attrs.frozen(kw_only=True)
class NoConfig:
    """The table of a plugin that has no settings: it may be present, but must be empty."""


C = TypeVar("C")


class Phase(enum.IntEnum):
    """When a plugin's ``transform_model`` runs; lower phases first."""

    MATERIALIZE = 10
    COMPRESS = 20
    PARALLELIZE = 30
    RECOMPUTE = 40
    COMPILE = 50
    SHARD = 60


class Layer(enum.IntEnum):
    """Where a plugin's ``wrap_communicator`` comes; lower layers are nearer to the transport."""

    MEASURE = 10
    CHANGE = 20


@attrs.frozen
class Probe:
    """The answer to "could this accelerator be used here?".

    Attributes:
        available: whether a run could start on it now.
        reason: why, in a few words ("2 devices", "no driver library").
    """

    available: bool
    reason: str


@attrs.frozen(kw_only=True)
class Rest:
    """Where a category of training state rests between uses, for those who plan.

    Attributes:
        place: "host" for its memory, "disk".
        share: how much of it does; the rest stays on the device.
        grain: bytes that come at a time.
        buffers: bytes of host memory that are kept for transfers.
    """

    place: Literal["host", "disk"]
    share: float = 1.0
    grain: int = 32 * 2**20
    buffers: int = 0


class Plugin(Generic[C]):
    """Base class of every plugin.

    A subclass names the attrs class of its TOML table as the type parameter;
    the registry fills that class from the table and constructs the plugin::

        class ZeroPlugin(Plugin[ZeroConfig]):
            name, api = "zero", 1

            @hookimpl
            def wrap_optimizer(self, model, optimizer, context): ...

    Attributes:
        name: the entry point's name, and the section in the TOML file.
        api: the plugin API the class was written for.
        phase: when ``transform_model`` runs; required of plugins that have one.
        layer: where ``wrap_communicator`` comes, before the order of the configuration.
        options: option tables that it adds: ``{"optimizer": {"lion": LionOptions}}``.
        fallback: for accelerators: chosen only when no other one is available.
        support: who answers for it: ``"first-party"`` or ``"community"``.
        Config: the attrs class of the table (from the type parameter).
        config: the table of this run.
    """

    name: ClassVar[str] = ""
    api: ClassVar[int] = 0
    phase: ClassVar[Phase | None] = None
    layer: ClassVar[Layer] = Layer.CHANGE
    options: ClassVar[Mapping[str, Mapping[str, type]]] = {}
    fallback: ClassVar[bool] = False
    support: ClassVar[str] = "community"
    Config: ClassVar[type[Any]] = NoConfig

    def __init__(self, config: C) -> None:
        self.config = config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in getattr(cls, "__orig_bases__", ()):
            origin = get_origin(base)
            if isinstance(origin, type) and issubclass(origin, Plugin):
                (table,) = get_args(base)
                if isinstance(table, type):
                    cls.Config = table

    def is_available(self) -> Probe:
        """Say whether this plugin's accelerator could be used, creating no device context.

        Asked only of plugins that make accelerators.
        """
        return Probe(True, "always there")

    @classmethod
    def check_ranks(cls, table: C, ranks: int) -> None:
        """Refuse a table that so many data ranks cannot be used with; ``powertrain config check --ranks`` asks.

        Nothing is constructed or connected then. A run asks as well, before its ranks connect.

        Raises:
            PowertrainError: says which numbers would do.
        """

    @classmethod
    def rests(cls, table: C) -> Mapping[str, Rest]:
        """Return the categories of training state that rest elsewhere than on the device under a table.

        ``powertrain plan`` asks; a run asks the hook ``make_tier``.
        """
        return {}

    @classmethod
    def kernel_sets(cls) -> tuple[KernelSet, ...]:
        """Return the C++ that the plugin has built on first use; ``powertrain kernels`` lists, builds and tests it."""
        return ()
