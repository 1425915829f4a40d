"""The plugin ``data``: a sampler that shuffles in constant memory and resumes at the exact sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from attrs import validators

from powertrain.hookspecs import hookimpl
from powertrain.plugin import Plugin

if TYPE_CHECKING:
    from powertrain.context import Context
    from powertrain.roles.sampler import Sampler


@attrs.frozen(kw_only=True)
class DataConfig:
    """In which order samples are seen."""

    shuffle: bool = True
    """Draw a new order each epoch; false takes the samples in the order of the dataset. Default true."""

    seed: int | None = attrs.field(
        default=None, validator=validators.optional([validators.ge(0), validators.lt(2**63)])
    )
    """Seeds the order, apart from every other random generator. Absent: ``[run] seed``."""


class DataPlugin(Plugin[DataConfig]):
    """Chooses each rank's samples."""

    name, api, support = "data", 1, "first-party"

    @hookimpl
    def make_sampler(self, dataset: Any, context: Context) -> Sampler:
        """Return a ``ShuffledSampler`` over ``dataset``.

        Raises:
            DataError: the dataset has no length, or is shorter than one global batch.
        """
        from powertrain_data.sampler import ShuffledSampler, length_of

        seed = self.config.seed
        return ShuffledSampler(
            length_of(dataset),
            context.batch,
            data_rank=context.mesh.index("data"),
            data_size=context.mesh.size("data"),
            seed=context.config.run.seed if seed is None else seed,
            shuffle=self.config.shuffle,
        )
