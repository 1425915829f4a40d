"""The tier of disks: slots are ranges of a rank's swap file, and leases are buffers of its pool."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from powertrain.errors import StorageError
from powertrain.roles.communicator import Done, Handle
from powertrain.roles.files import Transfer
from powertrain.roles.tier import Lease, Moved, Slot, Tier
from powertrain_offload.pool import Buffer, Pool
from powertrain_offload.swap import PAGE, SwapFile

_HOST = torch.device("cpu")


class DiskTier(Tier):
    """State rests on disks.

    Args:
        swap: where.
        pool: lends memory for it on its way.
        device: where it is used.
        grain: bytes that are best moved at a time.
        check: is told of the bytes that are to come, and refuses what there is no room for.
    """

    name = "nvme"

    def __init__(
        self, swap: SwapFile, pool: Pool, device: torch.device, grain: int, check: Callable[[int], None] | None = None
    ) -> None:
        self.device = device
        self.grain = grain
        self.swap, self.pool = swap, pool
        self._check = check

    def expect(self, nbytes: int) -> None:
        """Take note of what is to come.

        Raises:
            StorageFull: the disks have less.
        """
        if self._check is not None:
            self._check(nbytes)

    def reserve(self, label: str, nbytes: int) -> DiskSlot:
        """Return a slot of space that is set aside.

        Raises:
            StorageFull: there is none.
        """
        return DiskSlot(self, self.swap.allocate(nbytes, label), nbytes)

    def moved(self) -> Moved:
        """Return the bytes that were read from the swap file, and written into it."""
        return Moved(self.swap.bytes_read, self.swap.bytes_written)

    def settle(self) -> None:
        """Wait until everything that was stored is written."""
        self.pool.settle()


class DiskSlot(Slot):
    """A range of the swap file.

    Args:
        tier: whose.
        offset: where it starts in the file.
        nbytes: its size.
    """

    def __init__(self, tier: DiskTier, offset: int, nbytes: int) -> None:
        self.tier = tier
        self.device = tier.device
        self.offset, self.nbytes = offset, nbytes
        self._writes: list[tuple[int, int, Transfer]] = []

    def fetch(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        """Start to read; a write of the same bytes that is under way is awaited first."""
        end = self.nbytes if stop is None else stop
        low, high = self._reach(start, end)
        self._await_writes(low, high)
        buffer = self.tier.pool.borrow(high - low)
        read = self.tier.swap.read(self.offset + low, buffer.view[: high - low]) if high > low else Done()
        return DiskLease(self, start, end, low, buffer, read, device or self.device)

    def blank(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        """Lend memory."""
        end = self.nbytes if stop is None else stop
        low, high = self._reach(start, end)
        return DiskLease(self, start, end, low, self.tier.pool.borrow(high - low), None, device or self.device)

    def free(self) -> None:
        """Give the space back, once what is being written into it is there."""
        self._await_writes(0, self.nbytes + PAGE)
        self.tier.swap.free(self.offset, self.nbytes)

    def write(self, start: int, stop: int, buffer: Buffer, low: int) -> Handle:
        """Start to write bytes ``start`` to ``stop``, which lie in ``buffer`` from byte ``start - low`` on."""
        first, last = self._reach(start, stop)
        self._await_writes(first, last)
        if last == first:
            self.tier.pool.give_back(buffer)
            return Done()
        transfer = self.tier.swap.write(self.offset + first, buffer.view[first - low : last - low])
        self._writes.append((first, last, transfer))
        self.tier.pool.leaves(transfer, buffer)
        return transfer

    def _reach(self, start: int, stop: int) -> tuple[int, int]:
        """Return the bytes that are moved for these: whole pages where nobody else's lie in them."""
        return start, _up(stop) if start % PAGE == 0 and stop == self.nbytes else stop

    def _await_writes(self, low: int, high: int) -> None:
        remaining = []
        for first, last, transfer in self._writes:
            if first < high and low < last:
                transfer.wait()
            elif not transfer.done():
                remaining.append((first, last, transfer))
        self._writes = remaining


class DiskLease(Lease):
    """Bytes of a slot in a buffer, or on their way there; on another device, in a copy."""

    def __init__(
        self,
        slot: DiskSlot,
        start: int,
        stop: int,
        low: int,
        buffer: Buffer,
        read: Transfer | None,
        device: torch.device,
    ) -> None:
        self._slot, self._start, self._stop, self._low = slot, start, stop, low
        self._buffer: Buffer | None = buffer
        self._read = read
        self._host = buffer.tensor[start - low : stop - low]
        self._away = device.type != _HOST.type
        self.tensor = torch.empty_like(self._host, device=device) if self._away else self._host

    def wait(self) -> torch.Tensor:
        """Return the bytes when they have been read."""
        if self._read is not None:
            self._read.wait()
            self._read = None
            if self._away:
                self.tensor.copy_(self._host)
        return self.tensor

    def store(self) -> Handle:
        """Start to write."""
        buffer, self._buffer = self._buffer, None
        assert buffer is not None, "a lease has ended already"
        if self._read is not None:  # nobody looked at what was there: it stays
            self._read.wait()
        elif self._away:
            self._host.copy_(self.tensor)
        return self._slot.write(self._start, self._stop, buffer, self._low)

    def release(self) -> None:
        """Give the buffer back; what could not be read is not missed any more."""
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            return
        if self._read is not None:
            with contextlib.suppress(StorageError):
                self._read.wait()
            self._read = None
        self._slot.tier.pool.give_back(buffer)


def _up(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
