"""The default step runner: micro-batches one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from powertrain import nest
from powertrain.errors import BatchError
from powertrain.roles.runner import StepRunner

if TYPE_CHECKING:
    from powertrain.engine import Engine


class Accumulation(StepRunner):
    """Runs forward and backward of each micro-batch in turn.

    Args:
        engine: whose model runs.
        strict_micro: whether the micro-batch size was configured, so that other sizes are mistakes.
    """

    def __init__(self, engine: Engine, *, strict_micro: bool) -> None:
        self.engine = engine
        self.strict_micro = strict_micro

    def train(self, batch: Any) -> torch.Tensor:
        """Accumulate the gradients of ``batch`` and return its mean loss."""
        sizes = self.engine.context.batch
        total: torch.Tensor | None = None
        count = 0
        for micro in self._micro_batches(batch):
            loss = self.engine.loss(micro)
            self.engine.backward(loss)
            value = loss.detach().float()
            total = value if total is None else total + value
            count += 1
        if total is None or count != sizes.accumulation:
            raise BatchError(
                "the step ran out of micro-batches",
                expected=f"{sizes.accumulation} of them (batch.accumulation)",
                found=str(count),
            )
        return total if count == 1 else total / count

    @torch.no_grad()
    def evaluate(self, batch: Any) -> torch.Tensor:
        """Return the mean loss of ``batch``, run in pieces of a micro-batch."""
        total: torch.Tensor | None = None
        weight = 0
        size = self.engine.context.batch.micro if self.strict_micro else nest.samples(batch)
        for micro in nest.split(batch, size):
            count = nest.samples(micro)
            loss = self.engine.loss(micro).float() * count
            total = loss if total is None else total + loss
            weight += count
        assert total is not None
        return total / weight

    def _micro_batches(self, batch: Any) -> Iterator[Any]:
        sizes = self.engine.context.batch
        if isinstance(batch, Iterator):
            for _ in range(sizes.accumulation):
                if (micro := next(batch, None)) is None:
                    return
                if self.strict_micro and nest.samples(micro) != sizes.micro:
                    raise BatchError(
                        "a micro-batch has the wrong number of samples",
                        expected=f"{sizes.micro} (batch.micro)",
                        found=str(nest.samples(micro)),
                        remedy="an iterator yields micro-batches; pass a whole local batch as it is",
                    )
                yield micro
            return
        given = nest.samples(batch)
        local = sizes.micro * sizes.accumulation
        if self.strict_micro and given != local:
            raise BatchError(
                "the local batch has the wrong number of samples",
                expected=f"{local} = micro {sizes.micro} x accumulation {sizes.accumulation}",
                found=str(given),
            )
        if given % sizes.accumulation:
            raise BatchError(
                "the local batch cannot be cut into equal micro-batches",
                expected=f"a multiple of accumulation {sizes.accumulation}",
                found=f"{given} samples",
            )
        yield from nest.split(batch, given // sizes.accumulation)
