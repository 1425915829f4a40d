"""What every tier must do, as a class of tests.

::

    class TestMyTier(TierContract):
        def make(self, directory):
            return MyTier(directory, torch.device("cpu"))
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from powertrain.roles.tier import Lease, Slot, Tier
from powertrain.testing.capability import needs

SIZES = (1, 63, 64, 4095, 4096, 4097, 100_003, 300_000)
ODD = 70_001
"""Bytes of a slot that ends within a page, and within a block of 64."""

CUTS = (0, 1, 64, 4000, 4096, 8192, 8200, 40_960, 65_536, ODD)
EXAMPLES = 25
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""What fails is shown as it was found: to shrink it, megabytes would be moved for minutes."""

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "free", "write", "change", "look", "end", "end", "settle"]),
        st.integers(0, 2**32),
    ),
    min_size=20,
    max_size=60,
)
"""What is done, and the seed of the numbers that it needs."""


class TierContract:
    """Tests of one tier, made anew for each.

    A tier that rests some pieces here and others there (by ``place``) is tested through what it places.
    """

    def make(self, directory: Path) -> Tier:
        """Return a new tier; what it needs of files, it may put into ``directory``, which is empty."""
        raise NotImplementedError

    def held(self, tier: Tier) -> int | None:
        """Return the bytes that the tier has set aside for slots now; None where nobody tells."""
        return None

    @contextmanager
    def opened(self, directory: Path) -> Iterator[Tier]:
        """Make a tier, and close it at the end."""
        tier = self.make(directory)
        try:
            yield tier
        finally:
            tier.close()

    # --- what it says of itself ------------------------------------------------------------

    def test_describes_itself(self, tmp_path: Path) -> None:
        """It has a name, a device and a grain; what stays where it is used is resident there."""
        with self.opened(tmp_path) as tier:
            assert tier.name
            assert isinstance(tier.device, torch.device)
            assert tier.grain > 0
            assert 0.0 <= tier.late <= 1.0
            assert tier.resident or not tier.stays

    def test_a_slot_knows_its_size_and_device(self, tmp_path: Path) -> None:
        """A slot is as large as was asked for, and used where its tier says."""
        with self.opened(tmp_path) as tier:
            for nbytes in (0, *SIZES):
                place = tier.place(nbytes)
                slot = place.reserve(f"slot of {nbytes}", nbytes)
                assert slot.nbytes == nbytes
                assert slot.device == place.device

    def test_resident_slots_are_resident(self, tmp_path: Path) -> None:
        """What is resident lies where leases write; in a tier that says it is, all slots are, and else none."""
        with self.opened(tmp_path) as tier:
            for _ in range(4):
                place = tier.place(5000)
                slot = place.reserve("piece", 5000)
                assert (slot.resident is not None) == place.resident
                if slot.resident is None:
                    continue
                assert slot.resident.device == slot.device
                assert slot.resident.dtype == torch.uint8
                assert slot.resident.numel() == 5000
                write(slot, content(5000, 3))
                assert bytes(slot.resident.cpu().numpy()) == content(5000, 3)
                slot.resident[128:192] = 7
                assert read(slot, 128, 192) == bytes([7]) * 64

    def test_expects_and_places(self, tmp_path: Path) -> None:
        """It takes note of what is to come, and what it places rests and comes back."""
        with self.opened(tmp_path) as tier:
            tier.expect(0)
            tier.expect(16 * 5000)
            slots = [tier.place(5000).reserve(f"piece {number}", 5000) for number in range(16)]
            for number, slot in enumerate(slots):
                write(slot, content(5000, number))
            tier.settle()
            assert [read(slot) for slot in slots] == [content(5000, number) for number in range(16)]

    # --- leases ----------------------------------------------------------------------------

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_what_was_stored_is_fetched(self, tmp_path: Path, nbytes: int) -> None:
        """Content of any size comes back, again and again, until other content is stored."""
        with self.opened(tmp_path) as tier:
            slot = tier.reserve("piece", nbytes)
            for seed in (1, 2):
                write(slot, content(nbytes, seed))
                assert read(slot) == content(nbytes, seed)
                assert read(slot) == content(nbytes, seed)

    def test_a_lease_is_flat_bytes(self, tmp_path: Path) -> None:
        """Its tensor is uint8, flat, on the slot's device, and can be seen as any type where it starts at 64 bytes."""
        with self.opened(tmp_path) as tier:
            slot = tier.reserve("piece", ODD)
            for take in (slot.blank, slot.fetch):
                for start, stop in ((0, ODD), (64, 8256), (4096, 12_288)):
                    lease = take(start, stop)
                    tensor = lease.wait()
                    assert lease.wait() is tensor, "waiting again gives another tensor"
                    assert tensor is lease.tensor
                    assert (tensor.dtype, tensor.shape) == (torch.uint8, (stop - start,))
                    assert tensor.is_contiguous()
                    assert tensor.device == slot.device
                    assert tensor.data_ptr() % 64 == 0
                    if (stop - start) % 8 == 0:
                        assert tensor.view(torch.float64).numel() == (stop - start) // 8
                    lease.release()

    def test_a_lease_may_be_on_the_host(self, tmp_path: Path) -> None:
        """Content comes to the host's memory where that is asked for, and goes from there."""
        host = torch.device("cpu")
        with self.opened(tmp_path) as tier:
            slot = tier.reserve("piece", ODD)
            lease = slot.blank(0, ODD, host)
            lease.wait().copy_(tensor_of(content(ODD, 1)))
            lease.store()
            lease = slot.fetch(100, 9000, host)
            assert lease.wait().device == host
            assert bytes(lease.tensor.numpy()) == content(ODD, 1)[100:9000]
            lease.release()

    def test_any_range_is_fetched(self, tmp_path: Path) -> None:
        """A part of a slot comes alone, wherever it starts and ends."""
        whole = content(ODD, 5)
        with self.opened(tmp_path) as tier:
            slot = tier.reserve("piece", ODD)
            write(slot, whole)
            for start in CUTS:
                for stop in CUTS:
                    if start <= stop:
                        assert read(slot, start, stop) == whole[start:stop], f"bytes {start} to {stop} came out wrong"

    def test_ranges_stored_in_any_order_leave_their_neighbours(self, tmp_path: Path) -> None:
        """Parts that meet within a page or a block, stored in any order while others are under way, add up."""
        with self.opened(tmp_path) as tier:
            slot, right = tier.reserve("piece", ODD), bytearray(content(ODD, 0))
            write(slot, bytes(right))
            for seed in range(4):
                parts = list(pairwise(CUTS))
                random.Random(seed).shuffle(parts)
                leases = [(slot.blank(start, stop), start, stop) for start, stop in parts]
                for lease, start, stop in leases:
                    right[start:stop] = content(stop - start, seed)
                    lease.wait().copy_(tensor_of(right[start:stop]))
                    lease.store()
                for start, stop in parts[:3]:
                    change(slot, start, stop, right)
                assert read(slot) == right

    def test_many_leases_are_under_way(self, tmp_path: Path) -> None:
        """Pieces are fetched together, awaited in another order, changed, and stored in a third."""
        with self.opened(tmp_path) as tier:
            slots = [tier.reserve(f"piece {number}", 30_000 + number) for number in range(12)]
            for number, slot in enumerate(slots):
                write(slot, content(slot.nbytes, number))
            leases = [slot.fetch() for slot in slots]
            for lease in reversed(leases):
                lease.wait().bitwise_xor_(255)
            for number in sorted(range(12), key=lambda number: number % 5):
                leases[number].store()
            for number, slot in enumerate(slots):
                assert read(slot) == bytes(255 - byte for byte in content(slot.nbytes, number))

    def test_several_may_read_the_same(self, tmp_path: Path) -> None:
        """Leases that only read may overlap."""
        whole = content(ODD, 2)
        with self.opened(tmp_path) as tier:
            slot = tier.reserve("piece", ODD)
            write(slot, whole)
            leases = [slot.fetch(start, stop) for start, stop in ((0, ODD), (10, 5000), (4096, ODD), (10, 5000))]
            found = [bytes_of(lease.wait()) for lease in leases]
            for lease in leases:
                lease.release()
            assert found == [whole, whole[10:5000], whole[4096:], whole[10:5000]]

    def test_released_changes_are_forgotten(self, tmp_path: Path) -> None:
        """A lease that is released leaves what rests, unless it rests in this very memory; so does one not awaited."""
        with self.opened(tmp_path) as tier:
            slot, whole = tier.reserve("piece", ODD), content(ODD, 1)
            write(slot, whole)
            for take in (slot.fetch, slot.blank):
                lease = take(100, 60_000)
                lease.wait().fill_(9)
                lease.release()
                if slot.resident is None:
                    assert read(slot) == whole
            slot.fetch().release()
            slot.blank(0, 10).release()
            write(slot, whole)
            assert read(slot) == whole

    def test_a_later_fetch_waits_for_the_store(self, tmp_path: Path) -> None:
        """What is fetched right after a store, in whole or in part, is what was stored, though nobody waited."""
        with self.opened(tmp_path) as tier:
            slot = tier.reserve("piece", 300_000)
            for turn in range(20):
                whole = content(300_000, turn)
                write(slot, whole)
                start = turn * 1111
                assert read(slot, start, start + 5000) == whole[start : start + 5000]
                write(slot, whole[:70], 5000)
                assert read(slot, 4990, 5080) == whole[4990:5000] + whole[:70] + whole[5070:5080]

    def test_handles_tell_when_it_rests(self, tmp_path: Path) -> None:
        """A store's handle can be awaited, more than once, and then says that it is done."""
        with self.opened(tmp_path) as tier:
            slot = tier.reserve("piece", ODD)
            lease = slot.blank()
            lease.wait().fill_(1)
            handle = lease.store()
            handle.wait()
            handle.wait()
            assert handle.done()

    def test_settling_waits_for_every_store(self, tmp_path: Path) -> None:
        """After ``settle``, every handle is done, and what was stored is there."""
        with self.opened(tmp_path) as tier:
            tier.settle()
            slots = [tier.reserve(f"piece {number}", 200_000) for number in range(4)]
            handles = []
            for slot in slots:
                lease = slot.blank()
                lease.wait().fill_(4)
                handles.append(lease.store())
            tier.settle()
            assert all(handle.done() for handle in handles)
            assert all(read(slot, 0, 5) == bytes([4]) * 5 for slot in slots)

    def test_nothing_rests_too(self, tmp_path: Path) -> None:
        """A slot of no bytes, and a range of none, can be used like any other."""
        with self.opened(tmp_path) as tier:
            for nbytes in (0, 5000):
                slot = tier.reserve("piece", nbytes)
                write(slot, content(nbytes, 1))
                for start in {0, nbytes // 3, nbytes}:
                    for take in (slot.fetch, slot.blank):
                        lease = take(start, start)
                        assert lease.wait().numel() == 0
                        lease.store().wait()
                assert read(slot) == content(nbytes, 1)
                slot.free()
            tier.settle()

    def test_adopts_what_a_tensor_holds(self, tmp_path: Path) -> None:
        """A tensor's content rests, whatever its size."""
        with self.opened(tmp_path) as tier:
            for nbytes in (0, 1, ODD):
                slot = tier.adopt("piece", tensor_of(content(nbytes, 6)).to(tier.device))
                assert slot.nbytes == nbytes
                assert read(slot) == content(nbytes, 6)

    # --- room ------------------------------------------------------------------------------

    def test_slots_leave_one_another_alone(self, tmp_path: Path) -> None:
        """Slots that are reserved, written and freed in between do not touch those that stay."""
        with self.opened(tmp_path) as tier:
            kept = {number: tier.reserve(f"kept {number}", 3000 + 997 * number) for number in range(8)}
            for number, slot in kept.items():
                write(slot, content(slot.nbytes, number))
                other = tier.reserve("other", 2000 + 1500 * number)
                write(other, content(other.nbytes, 99))
                if number % 2:
                    other.free()
            kept.pop(3).free()
            for number in range(10, 14):
                kept[number] = tier.reserve("late", 3000)
                write(kept[number], content(3000, number))
            for number, slot in kept.items():
                assert read(slot) == content(slot.nbytes, number), f"slot {number} was overwritten"

    def test_freed_room_is_used_again(self, tmp_path: Path) -> None:
        """Reserving and freeing for ever takes no more than what is reserved at once."""
        with self.opened(tmp_path) as tier:
            needs(self.held(tier) is not None, "nobody tells how much it has set aside")
            seen = []
            draw = random.Random(0)
            for _ in range(50):
                slots = [tier.reserve("piece", draw.randrange(1, 200_000)) for _ in range(6)]
                for slot in slots:
                    write(slot, content(slot.nbytes, 1))
                held = self.held(tier)
                assert held is not None
                seen.append(held)
                draw.shuffle(slots)
                for slot in slots:
                    slot.free()
            assert max(seen) <= 6 * 204_800
            assert self.held(tier) == 0

    def test_closing_twice_is_harmless(self, tmp_path: Path) -> None:
        """A second ``close`` does nothing, nor does one of a tier that holds nothing."""
        tier = self.make(tmp_path)
        write(tier.reserve("piece", ODD), content(ODD, 1))
        tier.close()
        tier.close()

    def test_threads_share_it(self, tmp_path: Path) -> None:
        """Several threads use slots of their own at once."""
        errors: list[BaseException] = []

        def work(tier: Tier, number: int) -> None:
            try:
                for turn in range(10):
                    slot = tier.reserve(f"of thread {number}", 20_000 + 3000 * number)
                    write(slot, content(slot.nbytes, 10 * number + turn))
                    assert read(slot) == content(slot.nbytes, 10 * number + turn)
                    slot.free()
            except BaseException as error:
                errors.append(error)

        with self.opened(tmp_path) as tier:
            threads = [threading.Thread(target=work, args=(tier, number)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not errors, errors

    def test_it_holds_what_bytearrays_hold(self, tmp_path: Path) -> None:
        """Whatever is reserved, written, changed, looked at and freed, with leases left open in between."""

        @settings(max_examples=EXAMPLES, deadline=None, phases=PHASES)
        @given(steps=STEPS)
        def holds(steps: list[tuple[str, int]]) -> None:
            with TemporaryDirectory(dir=tmp_path) as place, self.opened(Path(place)) as tier:
                model = Model(tier)
                for what, seed in steps:
                    model.do(what, random.Random(seed))
                model.check()

        holds()


class Model:
    """Slots of a tier, each beside a bytearray that holds what it should, and the leases that are open.

    Args:
        tier: under test.
    """

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.slots: list[tuple[Slot, bytearray]] = []
        self.open: list[tuple[str, Slot, bytearray, Lease, int, int]] = []

    def do(self, what: str, draw: random.Random) -> None:
        """Do one thing, if it can be done now."""
        if what == "reserve":
            nbytes = draw.choice((0, 10, 4096, 8192, 20_000, draw.randrange(100_000)))
            slot, right = self.tier.place(nbytes).reserve("piece", nbytes), bytearray(draw.randbytes(nbytes))
            write(slot, bytes(right))
            self.slots.append((slot, right))
        elif what == "settle":
            self.tier.settle()
        elif what == "end":
            if self.open:
                self._end(*self.open.pop(draw.randrange(len(self.open))), draw)
        elif self.slots:
            self._use(what, *draw.choice(self.slots), draw)

    def _use(self, what: str, slot: Slot, right: bytearray, draw: random.Random) -> None:
        if what == "free":
            if not any(other is slot for _, other, *_ in self.open):
                self.slots = [(other, content) for other, content in self.slots if other is not slot]
                slot.free()
            return
        start, stop = sorted(draw.choice((0, slot.nbytes, draw.randint(0, slot.nbytes))) for _ in range(2))
        beside = [other for other in self.open if other[1] is slot and other[4] < stop and start < other[5]]
        if any(other[0] != "look" or what != "look" for other in beside):
            return
        lease = slot.blank(start, stop) if what == "write" else slot.fetch(start, stop)
        self.open.append((what, slot, right, lease, start, stop))

    def _end(
        self, what: str, slot: Slot, right: bytearray, lease: Lease, start: int, stop: int, draw: random.Random
    ) -> None:
        if what != "write":
            assert bytes_of(lease.wait()) == right[start:stop]
        if what == "look":
            lease.release()
            return
        right[start:stop] = draw.randbytes(stop - start)
        lease.wait().copy_(tensor_of(right[start:stop]))
        lease.store()

    def check(self) -> None:
        """End what is open, and compare everything."""
        while self.open:
            self._end(*self.open.pop(), random.Random(0))
        for slot, right in self.slots:
            assert read(slot) == right


def content(nbytes: int, seed: int) -> bytes:
    """Return bytes that no other seed gives."""
    return random.Random(seed).randbytes(nbytes)


def tensor_of(data: bytes | bytearray) -> torch.Tensor:
    """Return a tensor of the host that holds ``data``."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return what a tensor holds."""
    return bytes(tensor.cpu().numpy())


def write(slot: Slot, data: bytes, start: int = 0) -> None:
    """Store ``data`` from byte ``start`` on."""
    lease = slot.blank(start, start + len(data))
    lease.wait().copy_(tensor_of(data))
    lease.store()


def read(slot: Slot, start: int = 0, stop: int | None = None) -> bytes:
    """Return what rests."""
    lease = slot.fetch(start, stop)
    found = bytes_of(lease.wait())
    lease.release()
    return found


def change(slot: Slot, start: int, stop: int, right: bytearray) -> None:
    """Add one to each byte of a range, in the slot and in what it should hold."""
    lease = slot.fetch(start, stop)
    lease.wait().add_(1)
    lease.store()
    right[start:stop] = bytes((byte + 1) % 256 for byte in right[start:stop])
