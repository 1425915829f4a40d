"""Contexts without an engine: what a role is given, put together by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from powertrain import config as configuration
from powertrain.context import Context
from powertrain.discovery import schemas_for
from powertrain.environment import Rank
from powertrain.plugin import Plugin
from powertrain.precision import Recipe
from powertrain.registry import Registry
from powertrain.roles.accelerator import Accelerator
from powertrain.roles.communicator import Communicator
from powertrain.testing.null import NullHost


def make_context(
    communicator: Communicator,
    config: Mapping[str, Any] | None = None,
    *,
    accelerator: Accelerator | None = None,
    plugins: Sequence[Plugin[Any]] = (),
) -> Context:
    """Return the context of one rank, on one host, with all its peers.

    Args:
        communicator: connects the rank; its mesh and device become the context's.
        config: the configuration, of the shape of a TOML file.
        accelerator: what computes; the host when omitted.
        plugins: the plugins of the run.
    """
    document = configuration.read(config or {}, environ={})
    schemas = schemas_for(document, plugins)
    settings = configuration.structure(document, schemas.tables, installed=schemas.installed, options=schemas.options)
    mesh = communicator.mesh
    computes = NullHost() if accelerator is None else accelerator
    return Context(
        config=settings,
        rank=Rank(index=mesh.rank, world_size=mesh.world_size, local_index=mesh.rank, local_size=mesh.world_size),
        mesh=mesh,
        accelerator=computes,
        device=communicator.device,
        communicator=communicator,
        batch=configuration.resolve_batch(settings.batch, mesh.size("data")),
        recipe=Recipe.build(settings.precision, computes),
        hooks=Registry(plugins, settings.plugins.pin),
    )
