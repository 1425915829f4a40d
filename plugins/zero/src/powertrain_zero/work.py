"""One call of the optimizer: what it sees, and in which formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from powertrain.roles.optimizer import FlatOptimizer, Request, Total
from powertrain_zero.batch import Batch

AHEAD = 1
"""Batches that are on their way here while one is updated."""

Gradients = Mapping[torch.nn.Parameter, torch.Tensor]


class Work:
    """Lets an optimizer update batches.

    Args:
        optimizer: the optimizer.
        outs: where new values go in the model's format, of masters that stay.
        total: combines figures of parameters over the ranks.
        converts: state rests in the first format and is updated in the second; None: it rests as it is updated.
        tidy: called where the optimizer has made state that rests elsewhere now: what it leaves in the allocator is
            not to add up to all of it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        outs: Mapping[torch.nn.Parameter, torch.Tensor],
        total: Total,
        converts: tuple[torch.dtype, torch.dtype] | None,
        tidy: Callable[[], None],
    ) -> None:
        self._optimizer = optimizer
        self._flat = optimizer if isinstance(optimizer, FlatOptimizer) else None
        self._outs = dict(outs)
        self._total = total
        self._converts = converts
        self._tidy = tidy

    def beside(self) -> Work:
        """Return one that goes on with the numbers (lr, …) of now, whatever becomes of them, and the same state."""
        return Work(
            twin_of(self._optimizer), outs=self._outs, total=self._total, converts=self._converts, tidy=self._tidy
        )

    def do(self, batch: Batch, grads: Gradients, scale: float | torch.Tensor) -> None:
        """Update one batch, bring what comes for it and take it away again.

        Args:
            batch: what is updated.
            grads: the gradients of masters that stay, where the optimizer looks for them.
            scale: what gradients are still to be multiplied by.
        """
        batch.bind()
        if batch.travels:
            grads = self._deliver(batch, scale)
        if batch.travels or any(batch.members):
            with self._only(batch), self._asked(batch, grads, scale):
                self._optimizer.step()
        for master in grads if batch.travels else ():
            master.grad = None
        if batch.put_away(cast=self._flat is not None):
            self._tidy()

    def visit(self, batch: Batch, action: Callable[[torch.optim.Optimizer], None]) -> None:
        """Let ``action`` see the optimizer with one batch's masters and state in memory."""
        batch.fetch()
        batch.bind()
        with self._only(batch):
            action(self._optimizer)
        batch.put_away(cast=False)

    def _deliver(self, batch: Batch, scale: float | torch.Tensor) -> Gradients:
        """Put the gradients of what has come where the optimizer looks for them, scaled unless it scales itself."""
        grads = {master: grad for travel in batch.travels for master, grad in travel.grads.items()}
        for master, grad in grads.items():
            if self._flat is None:
                grads[master] = grad = grad.to(master.dtype, copy=True).mul_(scale)
            if grad.dtype == master.dtype:
                master.grad = grad
        return grads

    def _asked(self, batch: Batch, grads: Gradients, scale: float | torch.Tensor) -> AbstractContextManager[None]:
        """Ask a flat optimizer to scale, and to cast into what the model uses, on its way."""
        if self._flat is None:
            return nullcontext()
        others = {master: grad for master, grad in grads.items() if master.grad is None}
        outs = self._outs
        if batch.travels:
            outs = outs | {master: out for travel in batch.travels for master, out in travel.outs.items()}
        return self._flat.asked(Request(scale=scale, outs=outs, grads=others, total=self._total))

    @contextmanager
    def _only(self, batch: Batch) -> Iterator[None]:
        """Let the optimizer see one batch's masters, with their state in the master's format."""
        groups = self._optimizer.param_groups
        everything = [group["params"] for group in groups]
        try:
            for group, members in zip(groups, batch.members, strict=True):
                group["params"] = members
            with self._converted(batch.members):
                yield
        finally:
            for group, members in zip(groups, everything, strict=True):
                group["params"] = members

    @contextmanager
    def _converted(self, members: Sequence[Sequence[torch.nn.Parameter]]) -> Iterator[None]:
        """Let the state of some segments be in the master's format."""
        if self._converts is None:
            yield
            return
        state, master = self._converts
        self._convert(members, master)
        yield
        self._convert(members, state)

    def _convert(self, members: Sequence[Sequence[torch.nn.Parameter]], dtype: torch.dtype) -> None:
        """Convert the optimizer state of some segments, scalars excepted."""
        for masters in members:
            for master in masters:
                state = self._optimizer.state.get(master, {})
                for key, value in state.items():
                    if isinstance(value, torch.Tensor) and value.ndim > 0 and value.is_floating_point():
                        state[key] = value.to(dtype)


def twin_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return another optimizer of the same state, with numbers of its own that are the same now."""
    twin = object.__new__(type(optimizer))  # copy.copy leaves out what torch does not know of
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)  # a schedule that counts steps has put it there, bound to the other
    twin.param_groups = [dict(group) for group in optimizer.param_groups]
    return twin


def run_through(batches: Sequence[Batch], work: Work, grads: Gradients, scale: float | torch.Tensor) -> Iterator[Batch]:
    """Update batches, while the next one comes and the last one leaves; yield each when it is done."""
    fetched = 0
    try:
        for number, batch in enumerate(batches):
            while fetched < min(number + 1 + AHEAD, len(batches)):
                batches[fetched].fetch()
                fetched += 1
            work.do(batch, grads, scale)
            yield batch
    except BaseException:
        for batch in batches:
            batch.abandon()
        raise
