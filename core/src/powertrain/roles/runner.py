"""The runner role: how one local batch becomes accumulated gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch


class StepRunner(ABC):
    """Runs the forward and backward passes of one optimizer step."""

    @abstractmethod
    def train(self, batch: Any) -> torch.Tensor:
        """Run all micro-batches of ``batch`` and return their mean loss, a detached 0-d tensor.

        Args:
            batch: a full local batch (a nest of tensors), or an iterator of micro-batches.
        """

    @abstractmethod
    def evaluate(self, batch: Any) -> torch.Tensor:
        """Return the mean loss of ``batch`` without gradients, a 0-d tensor."""
