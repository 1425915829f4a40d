"""The hooks of the comm plugin; imports torch only inside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from powertrain.hookspecs import hookimpl
from powertrain.plugin import Plugin
from powertrain_comm.config import CommConfig

if TYPE_CHECKING:
    from powertrain.engine import Engine
    from powertrain.environment import Rank
    from powertrain.mesh import Mesh
    from powertrain.native import KernelSet
    from powertrain.roles.accelerator import Accelerator
    from powertrain.roles.communicator import Communicator
    from powertrain_comm.compress.communicator import CompressedCommunicator

SHARED = "shm"
"""What ``[communicator] use`` calls memory that the ranks of a host share."""

GRACE = 60.0
"""Seconds by which torch's own timeout lies behind the watchdog's, so that the watchdog speaks first."""


class CommPlugin(Plugin[CommConfig]):
    """Connects the ranks with torch.distributed and watches their collectives."""

    name = "comm"
    api = 1
    support = "first-party"

    def __init__(self, config: CommConfig) -> None:
        super().__init__(config)
        self._compressed: CompressedCommunicator | None = None

    @classmethod
    def kernel_sets(cls) -> tuple[KernelSet, ...]:
        """Return the collectives through shared memory."""
        from powertrain.native import KernelSet

        return (KernelSet("shm", "powertrain_comm.shm.source:SOURCE", "powertrain_comm.shm.selftest:check"),)

    @hookimpl
    def make_communicator(
        self, name: str | None, accelerator: Accelerator, mesh: Mesh, rank: Rank, timeout: float
    ) -> Communicator | None:
        """Join a process group of the backend ``name``, or of the accelerator's best one; share memory where it can."""
        from powertrain_comm.rendezvous import choose_backend
        from powertrain_comm.transport import TorchCommunicator

        limit = timeout + GRACE if self.config.watchdog else timeout
        device = accelerator.device(rank.local_index)
        backend = "gloo" if name == SHARED else choose_backend(name, accelerator)
        if backend is None:
            return None
        connected = TorchCommunicator(backend, device, mesh, rank, limit)
        if name == SHARED or (name is None and device.type == "cpu"):
            from powertrain_comm.shm.start import share

            return share(connected, rank, limit, asked=name is not None, algorithms=self.config.algorithms)
        connected.choose_algorithms(self.config.algorithms, rank)
        return connected

    @hookimpl
    def wrap_communicator(
        self, communicator: Communicator, accelerator: Accelerator, timeout: float
    ) -> Communicator | None:
        """Put the watchdog, with the cross-check on request, around ``communicator``; compression around both."""
        if communicator.world_size == 1:
            return None
        result = communicator
        if self.config.watchdog:
            from powertrain_comm.watchdog.watched import WatchedCommunicator

            result = WatchedCommunicator(result, timeout, cross_check=self.config.cross_check)
        if self.config.compress.method != "none":
            from powertrain_comm.compress.communicator import CompressedCommunicator

            result = self._compressed = CompressedCommunicator(result, self.config.compress, accelerator)
        return None if result is communicator else result

    @hookimpl
    def on_engine_ready(self, engine: Engine) -> None:
        """Refuse a dimension that there is not, and an optimizer that does not go with the method."""
        from powertrain_comm.compress.choice import check

        check(self.config.compress, engine)

    @hookimpl
    def on_step_start(self, engine: Engine) -> None:
        """Let gradients of this step travel as the configuration or the optimizer says."""
        if self._compressed is not None:
            from powertrain_comm.compress.choice import begin

            begin(self._compressed, self.config.compress, engine)
