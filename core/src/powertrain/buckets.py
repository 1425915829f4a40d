"""Gradients in flat buckets, averaged over the data dimension while backward goes on.

Each gradient is moved into its bucket as soon as autograd has it and the
parameter's own ``.grad`` is dropped, so gradients exist once, in the reduction
format. Buckets are sent in one fixed order on all ranks, each as soon as it and
those before it are complete; what is missing when the step begins is sent then,
so ranks that took different branches cannot wait for one another for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from powertrain.layout import FlatEntry, FlatLayout
from powertrain.roles.communicator import Communicator, Handle

BUCKET_BYTES = 25 * 2**20
"""Large enough to fill a network's pipe, small enough to leave most of backward to hide in."""


class _Slot:
    """One parameter's place in a bucket."""

    def __init__(self, bucket: _Bucket, entry: FlatEntry, index: int) -> None:
        self.bucket = bucket
        self.entry = entry
        self.index = index
        self.view = self.view_of(bucket.buffer)
        self.filled = False
        self.seen = False

    def view_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return this parameter's part of a buffer with the bucket's layout."""
        return buffer[self.entry.start : self.entry.stop].view(self.entry.shape)


class _Bucket:
    """Some parameters' gradients in one flat buffer, and one flag for each.

    The flags travel with the gradients: after the mean, a flag above zero says
    that some rank used the parameter. A bucket is sent once a step; gradients
    that come later, from a second backward pass, gather in a buffer of their own.
    """

    def __init__(self, index: int, named: Sequence[tuple[str, torch.nn.Parameter]], buffer: torch.Tensor) -> None:
        layout = FlatLayout.build([(name, param.shape) for name, param in named])
        self.buffer = buffer
        self.late: torch.Tensor | None = None
        self.numel = layout.numel
        self.slots = [_Slot(self, entry, place) for place, entry in enumerate(layout.entries)]
        self.label = f"gradients, bucket {index}: {named[0][0]}"
        if len(named) > 1:
            self.label += f" to {named[-1][0]} ({len(named)} parameters)"
        self.missing = len(named)
        self.handles: list[Handle] = []
        self.sent = False

    @property
    def flags(self) -> torch.Tensor:
        """One number a parameter: above zero where some rank has a gradient."""
        return self.buffer[self.numel :]

    def add_late(self, slot: _Slot, grad: torch.Tensor) -> None:
        """Keep a gradient that came after the bucket was sent."""
        if self.late is None:
            self.late = torch.zeros_like(self.buffer)
        slot.view_of(self.late).add_(grad)
        self.late[self.numel + slot.index] = 1

    def settle(self) -> None:
        """Wait for what was sent, and add what came late."""
        while self.handles:
            self.handles.pop().wait()
        if self.late is not None:
            self.buffer.add_(self.late)
            self.late = None


class GradientBuckets:
    """Collects, accumulates and averages the gradients of ``named`` parameters.

    Args:
        named: trainable parameters in the order in which backward is expected to
            finish them (the reverse of forward).
        communicator: averages over its data dimension.
        dtype: the format to accumulate and average in.
        bucket_bytes: the size at which a bucket is closed; None for ``BUCKET_BYTES``.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, torch.nn.Parameter]],
        communicator: Communicator,
        dtype: torch.dtype,
        bucket_bytes: int | None = None,
    ) -> None:
        self._communicator = communicator
        self._slots: dict[torch.nn.Parameter, _Slot] = {}
        self._buckets: list[_Bucket] = []
        self._next = 0
        self._last = True
        self._once = False
        self._flushed = False
        for group in _cut(named, (bucket_bytes or BUCKET_BYTES) // dtype.itemsize):
            numel = sum(param.numel() for _, param in group) + len(group)
            bucket = _Bucket(len(self._buckets), group, communicator.empty(numel, dtype))
            self._buckets.append(bucket)
            self._slots.update({param: slot for (_, param), slot in zip(group, bucket.slots, strict=True)})
        self._hooks = [param.register_post_accumulate_grad_hook(self._arrived) for param in self._slots]

    def begin(self, *, first: bool, last: bool, once: bool = False) -> None:
        """Prepare for a micro-batch.

        Args:
            first: old gradients are forgotten.
            last: buckets may be sent from now on.
            once: no parameter will get a second gradient from another backward pass.
        """
        self._last = last
        self._once = once if first else self._once and once
        if first:
            self._next = 0
            self._flushed = False
        for bucket in self._buckets:
            bucket.missing = len(bucket.slots)
            if first:
                bucket.sent = False
                bucket.late = None
            for slot in bucket.slots:
                slot.seen = False
                slot.filled = slot.filled and not first

    def _arrived(self, param: torch.Tensor) -> None:
        """Move a gradient that autograd has just finished into its bucket."""
        slot = self._slots[param]  # type: ignore[index]
        bucket, grad = slot.bucket, param.grad
        assert grad is not None
        if grad.is_sparse:
            grad = grad.to_dense()
        param.grad = None
        if bucket.sent:
            self._once = False
            bucket.add_late(slot, grad)
            return
        if slot.filled:
            slot.view.add_(grad)
        else:
            slot.view.copy_(grad)
            slot.filled = True
        if self._last and not slot.seen:
            slot.seen = True
            bucket.missing -= 1
            while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
                self._send(self._buckets[self._next])
                self._next += 1

    def _send(self, bucket: _Bucket) -> None:
        used = [slot.filled for slot in bucket.slots]
        if all(used):
            bucket.flags.fill_(1)
        else:
            for slot in bucket.slots:
                if not slot.filled:
                    slot.view.zero_()
            bucket.flags.copy_(torch.tensor(used))
        bucket.handles.append(self._reduce(bucket, bucket.buffer, bucket.label))
        bucket.sent = True

    def _reduce(self, bucket: _Bucket, buffer: torch.Tensor, label: str) -> Handle:
        gradients = buffer.numel() - len(bucket.slots)  # the flags behind them must arrive exactly
        return self._communicator.all_reduce(buffer, reduction="mean", label=label, lossy=gradients)

    def flush(self) -> None:
        """Send the buckets that backward did not complete, and gradients that came after theirs."""
        if self._flushed:
            return
        self._flushed = True
        for bucket in self._buckets:
            if not bucket.sent:
                self._send(bucket)
        self._next = len(self._buckets)
        if not self._once and self._any_rank_is_late():
            for bucket in self._buckets:
                if bucket.late is None:
                    bucket.late = torch.zeros_like(bucket.buffer)
                bucket.handles.append(self._reduce(bucket, bucket.late, f"late {bucket.label}"))

    def _any_rank_is_late(self) -> bool:
        """Return whether a rank had a second backward pass; which bucket it met differs between ranks."""
        late = any(bucket.late is not None for bucket in self._buckets)
        if self._communicator.size("data") == 1:
            return late
        answer = torch.full((1,), float(late), device=self._communicator.device)
        self._communicator.all_reduce(answer, reduction="max", label="late gradients?").wait()
        return bool(answer.item())

    def finish(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Send what was not sent, wait for all, and return each used parameter's mean gradient."""
        self.flush()
        for bucket in self._buckets:
            bucket.settle()
            if all(slot.filled for slot in bucket.slots):
                continue
            for slot, flag in zip(bucket.slots, bucket.flags.tolist(), strict=True):
                slot.filled = flag > 0
        return {param: slot.view for param, slot in self._slots.items() if slot.filled}

    def drain(self) -> None:
        """Wait for what is under way and forget it."""
        for bucket in self._buckets:
            bucket.settle()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()


def _cut(named: Sequence[tuple[str, torch.nn.Parameter]], limit: int) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """Cut parameters into runs of at most ``limit`` elements, or a single larger one."""
    groups: list[list[tuple[str, torch.nn.Parameter]]] = []
    size = 0
    for name, param in named:
        if not groups or size + param.numel() > limit:
            groups.append([])
            size = 0
        groups[-1].append((name, param))
        size += param.numel()
    return groups
