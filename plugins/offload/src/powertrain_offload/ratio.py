"""A part of the state leaves the device, the rest stays (Twin-Flow: ZeRO-Offload++)."""

from __future__ import annotations

import torch

from powertrain.roles.tier import Moved, Slot, Tier


class RatioTier(Tier):
    """Places a share of what is reserved in one tier, and the rest in another, piece by piece.

    Args:
        away: takes the share.
        near: takes the rest.
        ratio: the share, of bytes.
    """

    def __init__(self, away: Tier, near: Tier, ratio: float) -> None:
        self.name = f"{away.name} ({ratio:.0%})"
        self.device: torch.device = away.device
        self.grain = away.grain
        self.stays = away.stays
        self.late = away.late
        self._away, self._near, self._ratio = away, near, ratio
        self._gone = self._total = 0

    def expect(self, nbytes: int) -> None:
        """Let each take note of its share."""
        self._away.expect(int(nbytes * self._ratio))
        self._near.expect(nbytes - int(nbytes * self._ratio))

    def place(self, nbytes: int) -> Tier:
        """Return where the next piece rests, so that the shares come out as near to the ratio as pieces allow."""
        self._total += nbytes
        if self._gone + nbytes / 2 <= self._ratio * self._total:
            self._gone += nbytes
            return self._away.place(nbytes)
        return self._near.place(nbytes)

    def reserve(self, label: str, nbytes: int) -> Slot:
        """Reserve a piece that comes alone."""
        return self.place(nbytes).reserve(label, nbytes)

    def moved(self) -> Moved:
        """Return what has moved: the rest never does."""
        return self._away.moved()

    def settle(self) -> None:
        """Wait for both."""
        self._away.settle()
        self._near.settle()

    def close(self) -> None:
        """Close both."""
        self._away.close()
        self._near.close()
