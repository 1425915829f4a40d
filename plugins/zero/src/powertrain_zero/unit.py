"""A unit with its memory: gathered before its modules run, freed after."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from powertrain.roles.communicator import Communicator, Handle, Handles
from powertrain.roles.tier import Lease
from powertrain_zero.flat import Flat
from powertrain_zero.gradients import FlatGradients
from powertrain_zero.groups import Groups
from powertrain_zero.units import UnitPlan
from powertrain_zero.wire import GatherWire, PlainGather


class Unit:
    """Flat buffers that are gathered and reduced together.

    Args:
        plan: which parameters and modules.
        flats: its buffers, trainable ones and frozen ones apart.
        gradients: those of the trainable buffers.
        wire: how parameters travel.
        groups: over which ranks.
        communicator: connects them.

    Attributes:
        resident: the parameters are always here.
        ready: the parameters are here and may be used.
        open_calls: forward calls whose backward will tell when it is over.
        repeated: it was called more than once in a forward pass.
        done: backward is through with it in this micro-batch.
    """

    def __init__(
        self,
        plan: UnitPlan,
        flats: Sequence[Flat],
        gradients: Sequence[FlatGradients],
        wire: GatherWire,
        groups: Groups,
        communicator: Communicator,
    ) -> None:
        self.plan = plan
        self.flats = list(flats)
        self.gradients = list(gradients)
        self.resident = all(flat.resident for flat in flats)
        self.ready = self.resident
        self.open_calls = 0
        self.repeated = False
        self.done = False
        self._wire = wire
        self._exact = PlainGather(communicator, groups.shard)
        self._handle: Handle | None = None
        self._holds = 0
        self._in_use = False  # by a pass, beside those who hold it
        self._label = f"parameters of {plan.name}"
        self._leases: list[Lease] = []  # of its slices, while they are on their way here and to the other ranks
        self._kept: list[torch.Tensor] = []
        self._kept_valid = False
        self._secondary = None
        if groups.secondary is not None:
            self._secondary = PlainGather(communicator, groups.secondary)
            size, index = communicator.size(groups.secondary), communicator.index(groups.secondary)
            self._pieces = [(flat.numel // size * index, flat.numel // size * (index + 1)) for flat in flats]

    @property
    def name(self) -> str:
        """The unit's name, for people."""
        return self.plan.name

    @property
    def here(self) -> bool:
        """Whether the parameters are here, or on their way."""
        return self.ready or self._handle is not None

    @property
    def complete(self) -> bool:
        """Whether all its gradients can be sent: each arrived, or backward is through with it."""
        return self.done or all(gradients.complete for gradients in self.gradients)

    def fetch(self) -> None:
        """Start bringing this rank's slices to where they are gathered from; nothing is communicated."""
        nearer = self._kept_valid and self._secondary is not None
        if not (self.here or self._leases or nearer or self.resident):
            self._leases = [flat.fetch() for flat in self.flats]

    @torch.no_grad()
    def gather(self) -> None:
        """Start bringing the parameters here, from what was kept after forward if that is nearer."""
        if self.here:
            return
        for flat in self.flats:
            flat.allocate()
        if self._kept_valid and self._secondary is not None:
            label = f"{self._label}, within the node"
            handles = [
                self._secondary.gather(flat.full, kept, label)
                for flat, kept in zip(self.flats, self._kept, strict=True)
            ]
            self._handle = Handles(handles)
        else:
            self._gather_from(self._wire)

    def _gather_from(self, wire: GatherWire) -> None:
        """Start gathering the ranks' slices into memory that is there."""
        if not self._leases:
            self._leases = [flat.fetch() for flat in self.flats]
        slices = [lease.wait().view(flat.source_dtype) for lease, flat in zip(self._leases, self.flats, strict=True)]
        handles = [wire.gather(flat.full, own, self._label) for flat, own in zip(self.flats, slices, strict=True)]
        self._handle = handles[0] if len(handles) == 1 else Handles(handles)

    def _forget_leases(self) -> None:
        for lease in self._leases:
            lease.release()
        self._leases.clear()

    def wait(self) -> None:
        """Return when the parameters may be used; they must have been asked for."""
        if self._handle is not None:
            self._handle.wait()
            self._handle = None
            self._forget_leases()
            for flat in self.flats:
                flat.expose()
            self.ready = True

    @torch.no_grad()
    def keep(self) -> None:
        """Keep this rank's secondary slice of what is gathered, for backward."""
        if self._secondary is None or not self.ready or self.resident:
            return
        pieces = [flat.full[start:stop] for flat, (start, stop) in zip(self.flats, self._pieces, strict=True)]
        if not self._kept:
            self._kept = [torch.empty_like(piece) for piece in pieces]
        for kept, piece in zip(self._kept, pieces, strict=True):
            kept.copy_(piece)
        self._kept_valid = True

    def release(self) -> None:
        """Free the parameters, or let the last of those who hold them do it."""
        self.wait()
        self._in_use = False
        if self.ready and not self.resident and not self._holds:
            self.ready = False
            for flat in self.flats:
                flat.free()

    def hold(self) -> None:
        """Bring the parameters here, as exact as the model's format is, and keep them until ``let_go``."""
        if self._holds == 0:
            self._in_use = self.here
        self._holds += 1
        if self._holds == 1 and not self._wire.exact and not self.resident:
            # What travelled quantized for a pass is not what the masters say.
            self._bring_exact()
            return
        self.gather()
        self.wait()

    @torch.no_grad()
    def _bring_exact(self) -> None:
        self.wait()
        if not self.ready:
            for flat in self.flats:
                flat.allocate()
        self._gather_from(self._exact)
        self.wait()

    def let_go(self) -> None:
        """End a ``hold``: what no pass used when it began, or uses any more, is freed."""
        self._holds -= 1
        if not self._holds and not self._in_use:
            self.release()

    def forget_kept(self) -> None:
        """Drop the secondary slice, and what was fetched ahead: the parameters have changed."""
        self._kept_valid = False
        if not self.here:
            self._forget_leases()

    def refresh(self) -> None:
        """Bring parameters that are held up to date with the shards."""
        if self._holds and not self.resident:
            self._bring_exact()

    def casts(self, flat: Flat) -> bool:
        """Return whether new values travel from their own place in the whole buffer, in its format."""
        return self._wire.exact and flat.resident and flat.trainable and flat.full.dtype != flat.source_dtype

    def publish(self, *, frozen: bool = False, cast: bool = False) -> Handle:
        """Start bringing the slices' values into parameters that stay whole.

        Args:
            frozen: those of frozen parameters as well.
            cast: what ``casts`` is in the whole buffers, in their format, already.
        """
        flats = [flat for flat in self.flats if flat.resident and (flat.trainable or frozen)]
        return Handles([self._wire.gather(flat.full, self._new(flat, cast), f"new {self._label}") for flat in flats])

    def _new(self, flat: Flat, cast: bool) -> torch.Tensor:
        """Return the new values of this rank's slice."""
        if cast and self.casts(flat):
            return flat.own(flat.full)
        assert flat.shard is not None, "the slice of a whole buffer rests on the device"
        return flat.shard

    def send(self) -> None:
        """Start the reduction of its gradients."""
        for gradients in self.gradients:
            gradients.send()
