"""The entry point: makes the store of ``[checkpoint] directory`` and adds ``powertrain export``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from powertrain.hookspecs import hookimpl
from powertrain.plugin import NoConfig, Plugin

if TYPE_CHECKING:
    import click

    from powertrain.context import Context
    from powertrain.roles.checkpoint import CheckpointStore


class CheckpointPlugin(Plugin[NoConfig]):
    """Keeps checkpoints in a directory that all ranks see."""

    name, api, support = "checkpoint", 1, "first-party"

    @hookimpl
    def make_checkpoint_store(self, uri: str, context: Context) -> CheckpointStore | None:
        """Return the store of a path or a ``file:`` address; decline other schemes."""
        directory = local_directory(uri)
        if directory is None:
            return None
        from powertrain_checkpoint.store import DirectoryStore

        return DirectoryStore(
            directory,
            context.communicator,
            context.accelerator,
            make_engine=lambda: context.hooks.one("make_file_engine", context=context),
            threads=_threads(context),
            ranks=context.rank.local_size,
        )

    @hookimpl
    def add_commands(self, cli: click.Group) -> None:
        """Add ``powertrain export``."""
        from powertrain_checkpoint.command import export

        cli.add_command(export)


def _threads(context: Context) -> int:
    """Return how many threads of this rank copy and check: the host's ranks share its processors."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, here // context.rank.local_size))


def local_directory(uri: str) -> Path | None:
    """Return the directory that ``uri`` names, or None if it has a scheme other than ``file:``.

    A path may contain colons; only ``scheme://`` and ``file:`` are addresses.
    """
    if uri.startswith("file:"):
        return Path(unquote(urlsplit(uri).path))
    return None if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", uri) else Path(uri)
