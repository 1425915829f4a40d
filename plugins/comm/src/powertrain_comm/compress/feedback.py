"""The memory of what compression rounded away: it is added to what is sent next under the same name.

Error feedback ("Error Feedback Fixes SignSGD", Karimireddy et al., arXiv
1901.09847): nothing of a gradient is lost, it only arrives later.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from powertrain_comm.compress.codecs import Codec

if TYPE_CHECKING:
    from powertrain.precision import LossScale

_log = logging.getLogger("powertrain.comm")


WHOLE = "whole/"
"""How names begin whose elements lie in one order on any number of ranks."""


WHOLES = ("data", "world")
"""Dimensions along which they do."""


class Feedback:
    """Errors by name, in fp32; while a step is under way, in units of its loss scale, as its gradients are.

    Args:
        on: whether errors are kept at all; otherwise they are lost, and cost no memory.
    """

    def __init__(self, on: bool) -> None:
        self._on = on
        self._errors: dict[str, torch.Tensor] = {}
        self._saved: dict[str, torch.Tensor] = {}
        self._loss_scale: LossScale | None = None
        self._scale = 1.0  # that errors are multiplied by
        self._skipped = 0
        self._fresh = False

    @torch.no_grad()
    def encode(self, name: str, elements: torch.Tensor, codec: Codec) -> torch.Tensor:
        """Return ``elements`` (rows, numel) in fp32, with what is owed, as bytes; they are overwritten."""
        if not self._on:
            return codec.encode(elements)
        owed = self._owed(name, elements)
        if owed is not None:
            elements.add_(owed)
        else:
            owed = self._errors[name] = torch.empty_like(elements)
        rows = codec.encode(elements)
        codec.decode(rows, owed)
        # What was no number has arrived as none; owing it would spoil every step that follows.
        torch.sub(elements, owed, out=owed).nan_to_num_(0.0, 0.0, 0.0)
        return rows

    def _owed(self, name: str, like: torch.Tensor) -> torch.Tensor | None:
        owed = self._errors.get(name)
        if owed is None and (saved := self._saved.pop(name, None)) is not None:
            if saved.shape == like.shape:
                owed = self._errors[name] = saved.to(like.device, torch.float32)
            elif name.startswith(WHOLE):
                owed = self._errors[name] = torch.zeros_like(like)
                both = min(saved.numel(), like.numel())  # they differ in the padding at the end
                owed.view(-1)[:both].copy_(saved.view(-1)[:both])
            else:
                _log.info("what compression still owed to %s does not fit this run's layout and is let go", name)
        if owed is not None and owed.shape != like.shape:
            del self._errors[name]
            return None
        return owed

    def state(self) -> dict[str, torch.Tensor]:
        """Return every error in units of the gradients, what was loaded and not yet asked for included.

        The run that goes on may have another loss scale, or none.
        """
        self._drop_skipped()
        owed = {**self._saved, **self._errors}
        return owed if self._scale == 1.0 else {name: error / self._scale for name, error in owed.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Owe what ``state`` says, in units of the gradients, and nothing else."""
        self._errors.clear()
        self._saved = dict(state)
        self._loss_scale, self._scale = None, 1.0
        self._fresh = True

    def begin(self, loss_scale: LossScale, *, asked: bool) -> None:
        """Take note of a step that begins: errors are in units of its loss scale.

        Args:
            loss_scale: by which gradients are multiplied from now on.
            asked: the step before sent what it had compressed: what was loaded and not asked for never will be.
        """
        if asked and not self._fresh:
            self._forget_unasked()
        self._fresh = False
        self._drop_skipped()
        if loss_scale.value != self._scale:
            for error in (*self._errors.values(), *self._saved.values()):
                error.mul_(loss_scale.value / self._scale)
        self._loss_scale, self._scale, self._skipped = loss_scale, loss_scale.value, loss_scale.skipped

    def _drop_skipped(self) -> None:
        """Let go what a step owes that was not applied: its gradients were no numbers, or went with such."""
        if self._loss_scale is not None and self._loss_scale.skipped > self._skipped:
            self._errors.clear()
            self._saved.clear()
            self._skipped = self._loss_scale.skipped

    def _forget_unasked(self) -> None:
        if self._saved:
            _log.info(
                "compression lets go what it owed to %s: this run sends nothing under these names",
                ", ".join(sorted(self._saved)[:3]) + (" and others" if len(self._saved) > 3 else ""),
            )
            self._saved.clear()
