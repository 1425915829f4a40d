"""Fills in what a configuration leaves open and arithmetic can tell."""

from __future__ import annotations

import posixpath
from typing import Any

from powertrain.config.batch import resolve_batch
from powertrain.config.effective import Config
from powertrain.config.origin import DEFAULT, derived


def derive(config: Config, data_ranks: int) -> Config:
    """Return a copy whose batch sizes, number formats and checkpoint directory are all written down.

    Args:
        config: what ``structure`` returned.
        data_ranks: ranks that see different data.

    Raises:
        ConfigError: the batch sizes do not fit this number of ranks.
    """
    sizes = resolve_batch(config.batch, data_ranks, config.origins)
    for path, origin in sizes.origins.items():
        config = config.with_derived(path, getattr(sizes, path.partition(".")[2]), origin)
    precision, compute = config.precision, config.precision.compute
    scale: Any = "dynamic" if compute == "fp16" else 1.0
    if precision.master is None:
        config = config.with_derived("precision.master", "fp32", DEFAULT)
    if precision.reduce is None:
        config = config.with_derived("precision.reduce", "fp32", DEFAULT)
    if precision.loss_scale is None:
        config = config.with_derived("precision.loss_scale", scale, derived("precision.compute"))
    if config.checkpoint.directory is None:
        directory = posixpath.join(config.run.output, "checkpoints")
        config = config.with_derived("checkpoint.directory", directory, derived("run.output"))
    return config
