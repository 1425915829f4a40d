"""Where parameters get their first values from, a slice at a time.

Whoever holds parameters (an optimizer wrapper) asks for the slices that it keeps,
one parameter after the other, so a model may be larger than any rank.
"""

from __future__ import annotations

import torch


class Birth:
    """Gives parameters their first values."""

    @torch.no_grad()
    def fill(self, name: str, param: torch.nn.Parameter, target: torch.Tensor, start: int = 0) -> None:
        """Write elements ``start ..`` of a parameter's first value into ``target``, converting its type.

        Local: each rank asks for what it keeps.

        Args:
            name: the parameter's global name.
            param: the parameter, which may be on the meta device.
            target: flat; as many elements as are wanted.
            start: the first element wanted, in row-major order.
        """
        target.copy_(param.detach().reshape(-1)[start : start + target.numel()])
