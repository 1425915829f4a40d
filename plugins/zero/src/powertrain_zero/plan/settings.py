"""What a plan needs of a configuration: formats, batch sizes, ranks and the optimizer.

It reads a configuration as a run would, but starts nothing. The only module of
the plugin that asks parts of the core which are not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import attrs

from powertrain.config import BatchSizes, Config, read, resolve_batch, structure
from powertrain.errors import OptimizerError
from powertrain.plugin import Rest
from powertrain_zero.config import ZeroConfig

if TYPE_CHECKING:
    import torch

    from powertrain.config.tables import Format
    from powertrain.precision import Recipe
    from powertrain.roles.optimizer import OptimizerFactory


@attrs.frozen(kw_only=True)
class Settings:
    """A configuration, for a number of ranks.

    Attributes:
        config: all of it.
        zero: the ``[zero]`` table; None without one.
        ranks: data ranks.
        batch: batch sizes for so many.
    """

    config: Config
    zero: ZeroConfig | None
    ranks: int
    batch: BatchSizes


def load_settings(file: str, overrides: Sequence[str], ranks: int | None) -> Settings:
    """Read and check a configuration; imports no torch.

    Args:
        file: the TOML file.
        overrides: ``section.key=value`` strings.
        ranks: data ranks; None for what ``[batch]`` implies, or 1.

    Raises:
        ConfigError: something is wrong with it, or its batch sizes do not fit so many ranks.
    """
    from powertrain.discovery import schemas_for

    document = read(file, overrides=overrides)
    schemas = schemas_for(document)
    config = structure(document, schemas.tables, installed=schemas.installed, options=schemas.options)
    table = config.batch
    if ranks is None:
        local = (table.micro or 0) * (table.accumulation or 0)
        ranks = table.total // local if table.total and local else 1
    batch = resolve_batch(table, ranks, config.origins)
    return Settings(config=config, zero=config.tables.get("zero"), ranks=ranks, batch=batch)


def rests_of(config: Config) -> dict[str, Rest]:
    """Return what the plugins of a configuration let rest elsewhere than on the device, by category."""
    from powertrain.discovery import load

    return {key: rest for name, table in config.tables.items() for key, rest in load(name).rests(table).items()}


def make_recipe(config: Config, *, compute: str | None = None) -> Recipe:
    """Return the number formats of a run; with ``compute``, of one that computes in another."""
    from powertrain.precision import Recipe

    table = config.precision if compute is None else attrs.evolve(config.precision, compute=cast("Format", compute))
    return Recipe.build(table, cast("Any", _AnyDevice()))


class _AnyDevice:
    """A device that is not here: it computes in every format, and has no kernels of its own."""

    name = "any"

    def kernel(self, name: str) -> None:
        """Return None: the PyTorch reference stands for the device's kernels."""

    def dtypes(self) -> frozenset[torch.dtype]:
        """Return the formats of a configuration."""
        import torch

        return frozenset({torch.float32, torch.bfloat16, torch.float16})


def optimizer_factory(config: Config) -> OptimizerFactory:
    """Return what makes the configured optimizer, a plugin's or torch's own.

    Raises:
        OptimizerError: nobody makes it.
    """
    from powertrain import optimizers
    from powertrain.discovery import hooks_of, load
    from powertrain.registry import Registry

    table = config.optimizer
    makers = []
    for name, settings in config.tables.items():
        kind = load(name)
        if "make_optimizer" in hooks_of(kind):
            makers.append(kind(settings))
    made = Registry(makers, config.plugins.pin).one(
        "make_optimizer", name=table.name, options=dict(table.options), accelerator=_AnyDevice()
    )
    factory: OptimizerFactory | None = made or optimizers.torch_factory(table.name, table.options)
    if factory is None:
        raise OptimizerError(f"no plugin makes the optimizer {table.name!r}", where="optimizer.name")
    return factory


def whole_names(config: Config, model: torch.nn.Module) -> frozenset[str] | None:
    """Return the names of the parameters that the configured optimizer must see whole; None: it refuses such a model.

    Args:
        config: of the run.
        model: on the meta device.
    """
    from powertrain.names import named_parameters
    from powertrain.roles.optimizer import whole_parameters

    factory = optimizer_factory(config)
    named = [(name, param) for name, param in named_parameters(model) if param.requires_grad]
    try:
        made = factory(named if getattr(factory, "named", False) else [param for _, param in named])
    except Exception:  # of whatever kind an optimizer raises: the run itself will say it
        return None
    made.granularity = factory.granularity  # type: ignore[attr-defined]
    whole = whole_parameters(made)
    return frozenset(name for name, param in named if param in whole)


def on_host(config: Config) -> bool:
    """Return whether the run computes on the host: its memory is then the process's, and pages count once touched."""
    import torch

    use = config.accelerator.use
    return use == "cpu" or (use is None and not torch.accelerator.is_available())
