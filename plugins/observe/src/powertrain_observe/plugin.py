"""The hooks of the observe plugin; imports torch only inside them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar

from powertrain.hookspecs import hookimpl
from powertrain.plugin import Layer, Plugin
from powertrain_observe.config import ObserveConfig

if TYPE_CHECKING:
    from powertrain.engine import Engine
    from powertrain.roles.communicator import Communicator

_log = logging.getLogger("powertrain.observe")


class ObservePlugin(Plugin[ObserveConfig]):
    """Counts and times collectives."""

    name = "observe"
    api = 1
    support = "first-party"
    layer: ClassVar[Layer] = Layer.MEASURE

    @hookimpl
    def wrap_communicator(self, communicator: Communicator) -> Communicator | None:
        """Put the tracer next to the transport: it sees what travels."""
        if not self.config.comm:
            return None
        from powertrain_observe.traced import TracedCommunicator

        return TracedCommunicator(communicator)

    @hookimpl
    def on_step_end(self, engine: Engine) -> None:
        """Log the table after every ``comm_every``-th step, on rank 0."""
        every = self.config.comm_every
        if every and engine.global_step % every == 0 and engine.context.rank.index == 0:
            from powertrain_observe import comm_table

            _log.info("collectives of rank 0 up to step %d:\n%s", engine.global_step, comm_table(engine))
