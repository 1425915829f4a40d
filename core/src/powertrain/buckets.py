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

from powertrain.layout import FlatLayout
from powertrain.roles.communicator import Communicator, Handle

BUCKET_BYTES = 25 * 2**20
"""Large enough to fill a network's pipe, small enough to leave most of backward to hide in."""


class _Slot:
    """One parameter's place in a bucket."""

    def __init__(self, bucket: _Bucket, view: torch.Tensor) -> None:
        self.bucket = bucket
        self.view = view
        self.filled = False
        self.seen = False


class _Bucket:
    """Some parameters' gradients in one flat buffer, and one flag for each.

    The flags travel with the gradients: after the mean, a flag above zero says
    that some rank used the parameter.
    """

    def __init__(self, index: int, named: Sequence[tuple[str, torch.nn.Parameter]], buffer: torch.Tensor) -> None:
        layout = FlatLayout.build([(name, param.shape) for name, param in named])
        self.buffer = buffer
        self.flags = buffer[layout.numel : layout.numel + len(named)]
        self.slots = [_Slot(self, buffer[entry.start : entry.stop].view(entry.shape)) for entry in layout.entries]
        self.label = f"gradients, bucket {index}: {named[0][0]}"
        if len(named) > 1:
            self.label += f" to {named[-1][0]} ({len(named)} parameters)"
        self.missing = len(named)
        self.handle: Handle | None = None
        self.sent = False

    def settle(self) -> None:
        """Wait for the mean; from then on a parameter counts as used if any rank used it."""
        if self.handle is None:
            return
        self.handle.wait()
        self.handle = None
        if not all(slot.filled for slot in self.slots):
            for slot, flag in zip(self.slots, self.flags.tolist(), strict=True):
                slot.filled = flag > 0


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
        for group in _cut(named, (bucket_bytes or BUCKET_BYTES) // dtype.itemsize):
            numel = sum(param.numel() for _, param in group) + len(group)
            bucket = _Bucket(len(self._buckets), group, communicator.empty(numel, dtype))
            self._buckets.append(bucket)
            self._slots.update({param: slot for (_, param), slot in zip(group, bucket.slots, strict=True)})
        self._hooks = [param.register_post_accumulate_grad_hook(self._arrived) for param in self._slots]

    def begin(self, *, first: bool, last: bool) -> None:
        """Prepare for a micro-batch; ``first`` forgets old gradients, ``last`` lets buckets go."""
        self._last = last
        self._next = 0 if first else self._next
        for bucket in self._buckets:
            if first:
                bucket.sent = False
            bucket.missing = len(bucket.slots)
            for slot in bucket.slots:
                slot.seen = False
                if first:
                    slot.filled = False

    def _arrived(self, param: torch.Tensor) -> None:
        """Move a gradient that autograd has just finished into its bucket."""
        slot = self._slots[param]  # type: ignore[index]
        bucket, grad = slot.bucket, param.grad
        assert grad is not None
        if bucket.handle is not None:
            # A second backward before the step. The mean is sent again with the
            # addition: averaging what is already equal everywhere changes nothing.
            bucket.settle()
            bucket.sent = False
        if grad.is_sparse:
            grad = grad.to_dense()
        if slot.filled:
            slot.view.add_(grad)
        else:
            slot.view.copy_(grad)
            slot.filled = True
        param.grad = None
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
        bucket.handle = self._communicator.all_reduce(bucket.buffer, reduction="mean", label=bucket.label)
        bucket.sent = True

    def flush(self) -> None:
        """Send the buckets that backward did not complete."""
        for bucket in self._buckets:
            if not bucket.sent:
                self._send(bucket)
        self._next = len(self._buckets)

    def finish(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Send what was not sent, wait for all, and return each used parameter's mean gradient."""
        self.flush()
        for bucket in self._buckets:
            bucket.settle()
        return {param: slot.view for param, slot in self._slots.items() if slot.filled}

    def drain(self) -> None:
        """Wait for what is under way and forget it."""
        for bucket in self._buckets:
            if bucket.handle is not None:
                bucket.handle.wait()
                bucket.handle = None

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
