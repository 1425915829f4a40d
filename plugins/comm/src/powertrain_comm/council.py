"""What the ranks of the world agree on before they choose algorithms.

Messages have a tag of their own and pass through rank 0, so they never meet a
collective that some rank has under way in the same group.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from powertrain_comm.operations import Group

TAG = 0x7A64
"""Of the council's messages; ``pairwise.TAGS`` are the exchanges'."""


class Council:
    """All ranks of the world; each method is called by all of them together.

    Args:
        world: the group of all ranks.
    """

    def __init__(self, world: Group) -> None:
        self._handle = world.handle
        self._count = len(world.ranks)
        self.leads = world.index == 0

    def slowest(self, values: Sequence[float]) -> list[float]:
        """Return the largest of all ranks' first value, of their second, and so on: the same on every rank."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.leads:
            mine = torch.stack([mine, *self._hear(mine)]).amax(0)
        return [float(value) for value in self._repeat(mine)]

    def gather(self, digest: bytes) -> list[bytes]:
        """Return every rank's digest, all of one length, on rank 0; nothing on the others."""
        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        if self.leads:
            return [row.numpy().tobytes() for row in (mine, *self._hear(mine))]
        self._handle.send([mine], 0, TAG).wait()
        return []

    def tell(self, value: Any) -> Any:
        """Return rank 0's ``value``, which is JSON, on every rank."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = int(self._spread(torch.tensor([data.numel()]))[0])
        text = self._spread(data if self.leads else torch.empty(length, dtype=torch.uint8))
        return json.loads(text.numpy().tobytes())

    def _hear(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Return what each of the others sends."""
        rows = [torch.empty_like(like) for _ in range(1, self._count)]
        for work in [self._handle.recv([row], rank, TAG) for rank, row in enumerate(rows, 1)]:
            work.wait()
        return rows

    def _repeat(self, value: torch.Tensor) -> torch.Tensor:
        """Send ``value`` to rank 0 and return what that makes of it."""
        if not self.leads:
            self._handle.send([value], 0, TAG).wait()
        return self._spread(value)

    def _spread(self, value: torch.Tensor) -> torch.Tensor:
        """Return rank 0's ``value``; that of the others is written over."""
        if self.leads:
            works = [self._handle.send([value], rank, TAG) for rank in range(1, self._count)]
        else:
            works = [self._handle.recv([value], 0, TAG)]
        for work in works:
            work.wait()
        return value
