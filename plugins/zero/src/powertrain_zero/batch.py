"""What one call of the optimizer updates, and how what rests elsewhere comes to it and leaves again."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch

from powertrain.roles.tier import Lease
from powertrain_zero.chunk import Chunk
from powertrain_zero.gradients import FlatGradients
from powertrain_zero.kept import KeptState
from powertrain_zero.unit import Unit


class Travel:
    """Brings one chunk's masters, state and gradients to where they are updated, and takes them away.

    Args:
        gradients: of the flat whose chunk it is.
        chunk: the chunk.
        state: the optimizer's ``state``.

    Attributes:
        grads: the gradients of masters that have one, between ``bind`` and ``put_away``.
        outs: where the masters' new values go in the model's format, where that is apart.
        kept: the optimizer's state, where it does not stay.
        held: the model does not see new values before ``show``.
    """

    def __init__(self, gradients: FlatGradients, chunk: Chunk, state: MutableMapping[torch.Tensor, Any]) -> None:
        self.chunk = chunk
        self.grads: dict[torch.nn.Parameter, torch.Tensor] = {}
        self.outs: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._flat, self._gradients = gradients.flat, gradients
        label = f"{self._flat.label} [{chunk.start}:{chunk.stop}]"
        self.kept = None if chunk.place.resident else KeptState(chunk, state, label)
        self.held = False
        self._masters: Lease | None = None
        self._grads: Lease | None = None
        self._outs: Lease | None = None
        self._unseen: torch.Tensor | None = None

    def fetch(self) -> None:
        """Start to bring everything."""
        chunk = self.chunk
        self._masters = chunk.fetch()
        self._grads = self._gradients.fetch(chunk.start, chunk.stop, chunk.device)
        if self.kept is not None:
            self.kept.fetch()

    def bind(self) -> None:
        """Let masters and state have their memory, and find the gradients."""
        chunk = self.chunk
        assert self._masters is not None and self._grads is not None
        masters, grads = self._masters.wait(), self._grads.wait().view(self._gradients.dtype)
        if chunk.resident is None:
            chunk.bind(masters)
        if self.kept is not None:
            self.kept.bind()
        used = [segment for segment in chunk.segments if self._gradients.anywhere[segment.index]]
        self.grads = {segment.master: segment.of(grads, chunk.start) for segment in used}
        if self._flat.apart:
            if self.held:
                size, dtype = chunk.stop - chunk.start, self._flat.source_dtype
                values = self._unseen = torch.empty(size, dtype=dtype, device=chunk.device)
            else:
                self._outs = self._flat.blank(chunk)
                values = self._outs.wait().view(self._flat.source_dtype)
            self.outs = {segment.master: segment.of(values, chunk.start) for segment in chunk.segments}

    def put_away(self, *, cast: bool) -> bool:
        """Store what was updated; return whether the optimizer has made state in memory of its own.

        Args:
            cast: ``outs`` have the new values of the masters with gradients already.
        """
        chunk = self.chunk
        assert self._masters is not None and self._grads is not None
        for master, out in self.outs.items():
            if not (cast and master in self.grads):
                out.copy_(master.detach())
        self.grads, self.outs = {}, {}
        if self._outs is not None:
            self._outs.store()
        made = self.kept is not None and self.kept.put_away()
        if chunk.resident is None:
            chunk.unbind()
        self._masters.store()
        self._grads.release()
        self._masters = self._grads = self._outs = None
        return made

    def show(self) -> None:
        """Let the model see the values of the last update."""
        values, self._unseen = self._unseen, None
        if values is not None:
            self._flat.write(self.chunk, values)

    def abandon(self) -> None:
        """End all loans after a failure."""
        for lease in (self._masters, self._grads, self._outs):
            if lease is not None:
                lease.release()
        self._masters = self._grads = self._outs = None
        if self.kept is not None:
            self.kept.release()
        if self.chunk.resident is None:
            self.chunk.unbind()


class Batch:
    """Parameters that one call of the optimizer updates.

    Args:
        members: masters, for each of the optimizer's groups.
        travels: chunks that come for it.
        units: which are complete after it, and are published.
        of: the unit that it is of; None for several.
    """

    def __init__(
        self,
        members: Sequence[list[torch.nn.Parameter]],
        travels: Sequence[Travel] = (),
        units: Sequence[Unit] = (),
        of: Unit | None = None,
    ) -> None:
        self.of = of
        self.members = list(members)
        self.travels = list(travels)
        self.units = list(units)

    def fetch(self) -> None:
        """Start to bring what rests elsewhere."""
        for travel in self.travels:
            travel.fetch()

    def bind(self) -> None:
        """Wait for it, and let the optimizer see it."""
        for travel in self.travels:
            travel.bind()

    def put_away(self, *, cast: bool) -> bool:
        """Store it again; see ``Travel.put_away``."""
        made = [travel.put_away(cast=cast) for travel in self.travels]
        return any(made)

    def abandon(self) -> None:
        """End all loans after a failure."""
        for travel in self.travels:
            travel.abandon()

    def hold(self) -> None:
        """Let the model not see new values before ``show``."""
        for travel in self.travels:
            travel.held = True

    def show(self) -> None:
        """Let the model see the values of the last update."""
        for travel in self.travels:
            travel.show()
