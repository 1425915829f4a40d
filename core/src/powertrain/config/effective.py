"""The configuration as the run sees it: checked, complete, and every value with its origin."""

from __future__ import annotations

import datetime
import enum
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import attrs

from powertrain.config.origin import DEFAULT, Origin, key
from powertrain.config.record import open_field
from powertrain.config.tables import (
    CORE_TABLES,
    AcceleratorTable,
    Batch,
    Checkpoint,
    CommunicatorTable,
    Optimizer,
    Plugins,
    Precision,
    Run,
    Scheduler,
)


def _frozen(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(mapping))


@attrs.frozen(kw_only=True)
class Config:
    """An effective configuration.

    Attributes:
        name: what to call it in messages.
        run: the core's own tables, one attribute each.
        tables: the plugins' tables, in the order of the file.
        origins: dotted path of every value to where it comes from.
    """

    name: str = "config"
    run: Run = attrs.field(factory=Run)
    accelerator: AcceleratorTable = attrs.field(factory=AcceleratorTable)
    communicator: CommunicatorTable = attrs.field(factory=CommunicatorTable)
    batch: Batch = attrs.field(factory=Batch)
    optimizer: Optimizer = attrs.field(factory=Optimizer)
    scheduler: Scheduler = attrs.field(factory=Scheduler)
    precision: Precision = attrs.field(factory=Precision)
    checkpoint: Checkpoint = attrs.field(factory=Checkpoint)
    plugins: Plugins = attrs.field(factory=Plugins)
    tables: Mapping[str, Any] = attrs.field(factory=dict, converter=_frozen)
    origins: Mapping[str, Origin] = attrs.field(factory=dict, converter=_frozen)

    def __getstate__(self) -> dict[str, Any]:
        state = {field.name: getattr(self, field.name) for field in attrs.fields(type(self))}
        return state | {"tables": dict(self.tables), "origins": dict(self.origins)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def table(self, section: str) -> Any:
        """Return the object of a section, the core's or a plugin's."""
        return getattr(self, section) if section in CORE_TABLES else self.tables[section]

    def is_stated(self, path: str) -> bool:
        """Return whether someone set the value at ``path``, rather than a default or a derivation."""
        return self.origins.get(path, DEFAULT).kind not in ("default", "derived")

    def with_derived(self, path: str, value: Any, origin: Origin) -> Config:
        """Return a copy in which a value that was computed is written down together with what it comes from.

        Args:
            path: ``section.key``; the key may be an option of an open table.
            value: the value, of the key's type.
            origin: see ``powertrain.config.derived``.
        """
        section, _, name = path.partition(".")
        table = self.table(section)
        rest = open_field(type(table))
        if rest is not None and name not in attrs.fields_dict(type(table)):
            changed = attrs.evolve(table, **{rest.name: {**getattr(table, rest.name), name: value}})
        else:
            changed = attrs.evolve(table, **{name: value})
        origins = {**self.origins, path: origin}
        if section in CORE_TABLES:
            return attrs.evolve(self, origins=origins, **{section: changed})
        return attrs.evolve(self, origins=origins, tables={**self.tables, section: changed})

    def effective(self) -> dict[str, dict[str, Any]]:
        """Return every value as plain dicts and lists, sections as keys; an absent value is None."""
        return {section: plain(self.table(section)) for section in (*CORE_TABLES, *self.tables)}

    def values(self) -> Iterator[tuple[str, Any, Origin]]:
        """Yield the dotted path, value and origin of every value, in the order of the sections."""
        for path, value in leaves(self.effective()):
            yield path, value, self.origins.get(path, DEFAULT)

    def to_toml(self) -> str:
        """Write the configuration as TOML that reads back as the same one; absent values are left out."""
        from powertrain.config.toml import write

        return write(self.effective())


def plain(value: Any) -> Any:
    """Reduce a value to what TOML and JSON can hold; the options of an open table join its other keys."""
    if attrs.has(type(value)):
        rest = open_field(type(value))
        table = {field.name: plain(getattr(value, field.name)) for field in attrs.fields(type(value))}
        return table if rest is None else table | table.pop(rest.name)
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def leaves(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and value of everything in nested dicts that is no table, or an empty one."""
    for name, value in table.items():
        below = f"{path}.{key(name)}" if path else key(name)
        if isinstance(value, dict) and value:
            yield from leaves(value, below)
        else:
            yield below, value
