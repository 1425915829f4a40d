"""Tiers with one fault each: the contract must catch every one."""

from __future__ import annotations

import pytest
import torch

from powertrain.roles.communicator import Done
from powertrain.roles.tier import DeviceSlot, DeviceTier, Lease, Slot, Tier
from powertrain.testing.tier import TierContract

CPU = torch.device("cpu")


class Later:
    """A store that happens when somebody needs it to have happened."""

    def __init__(self, action):
        self.action = action

    def wait(self):
        action, self.action = self.action, None
        if action is not None:
            action()

    def done(self):
        return self.action is None


class LateTier(Tier):
    """Content rests in one bytearray, and comes and goes as late as it may."""

    name = "late"
    device = CPU

    def __init__(self):
        self.memory = bytearray()
        self.gaps = []
        self.stores = []
        self.used = 0
        self.closed = False

    def reserve(self, label, nbytes):
        self.used += nbytes
        for gap in self.gaps:
            if gap[1] >= nbytes:
                self.gaps.remove(gap)
                return LateSlot(self, gap[0], nbytes)
        start = len(self.memory)
        self.memory += bytes(nbytes)
        return LateSlot(self, start, nbytes)

    def settle(self):
        for store in self.stores:
            store.wait()
        self.stores.clear()

    def close(self):
        self.settle()
        self.closed = True


class LateSlot(Slot):
    device = CPU

    def __init__(self, tier, base, nbytes):
        self.tier, self.base, self.nbytes = tier, base, nbytes

    def fetch(self, start=0, stop=None, device=None):
        self.tier.settle()
        return self.lend(start, self.nbytes if stop is None else stop, full=True)

    def blank(self, start=0, stop=None, device=None):
        return self.lend(start, self.nbytes if stop is None else stop, full=False)

    def lend(self, start, stop, *, full):
        return LateLease(self, start, stop, full)

    def free(self):
        self.tier.settle()
        self.tier.used -= self.nbytes
        self.tier.gaps.append((self.base, self.nbytes))


class LateLease(Lease):
    def __init__(self, slot, start, stop, full):
        self.slot, self.start, self.stop, self.full = slot, start, stop, full
        self.tensor = torch.full((stop - start,), 0xAB, dtype=torch.uint8)

    def wait(self):
        if self.full:
            self.full = False
            data = self.slot.tier.memory[self.slot.base + self.start : self.slot.base + self.stop]
            if data:
                self.tensor.copy_(torch.frombuffer(data, dtype=torch.uint8))
        return self.tensor

    def store(self):
        self.wait()
        tier, first = self.slot.tier, self.slot.base + self.start

        def arrive():
            tier.memory[first : first + len(self.tensor)] = bytes(self.tensor.numpy())

        store = Later(arrive)
        tier.stores.append(store)
        return store

    def release(self):
        pass


class FetchesBeforeTheStoreArrives(LateTier):
    def reserve(self, label, nbytes):
        made = super().reserve(label, nbytes)
        made.fetch = lambda start=0, stop=None, device=None: made.lend(
            start, made.nbytes if stop is None else stop, full=True
        )
        return made


class GivesLeasesOfOneMemory(LateTier):
    def __init__(self):
        super().__init__()
        self.one = torch.zeros(400_000, dtype=torch.uint8)

    def reserve(self, label, nbytes):
        made, lend = super().reserve(label, nbytes), LateSlot.lend

        def shared(start, stop, *, full):
            lease = lend(made, start, stop, full=full)
            lease.tensor = self.one[: stop - start]
            return lease

        made.lend = shared
        return made


class StoresWhatIsReleased(LateTier):
    def reserve(self, label, nbytes):
        made, lend = super().reserve(label, nbytes), LateSlot.lend

        def kept(start, stop, *, full):
            lease = lend(made, start, stop, full=full)
            lease.release = lease.store
            return lease

        made.lend = kept
        return made


class StoresWholeBlocks(LateTier):
    def reserve(self, label, nbytes):
        made, lend = super().reserve(label, nbytes), LateSlot.lend
        made.lend = lambda start, stop, *, full: lend(made, start - start % 512, stop, full=full)
        made.fetch = lambda start=0, stop=None, device=None: LateSlot.fetch(made, start, stop)

        def exact(start, stop, *, full):
            wide = LateLease(made, start - start % 512, stop, full)
            wide.tensor.fill_(0)
            lease = LateLease(made, start, stop, full)

            def store():
                wide.tensor[start % 512 :] = lease.wait()
                return wide.store()

            lease.store = store
            return lease

        made.lend = exact
        return made


class ForgetsToSettle(LateTier):
    def reserve(self, label, nbytes):
        made = super().reserve(label, nbytes)

        def fetch(start=0, stop=None, device=None):
            LateTier.settle(self)
            return made.lend(start, stop or made.nbytes, full=True)

        made.fetch = fetch
        return made

    def settle(self):
        pass


class NeverUsesRoomAgain(LateTier):
    def reserve(self, label, nbytes):
        self.gaps.clear()
        self.used = len(self.memory) + nbytes
        return super().reserve(label, nbytes)


class GivesRoomAwayTwice(LateTier):
    def reserve(self, label, nbytes):
        gaps = list(self.gaps)
        made = super().reserve(label, nbytes)
        self.gaps = gaps
        return made


class IsShort(LateTier):
    def reserve(self, label, nbytes):
        made = super().reserve(label, nbytes)
        made.nbytes = max(0, nbytes - 1)
        return made


class RefusesNothing(LateTier):
    def reserve(self, label, nbytes):
        if not nbytes:
            raise ValueError("nothing to reserve")
        return super().reserve(label, nbytes)


class ClosesOnce(LateTier):
    def close(self):
        assert not self.closed
        super().close()


class IsNotAligned(LateTier):
    def reserve(self, label, nbytes):
        made, lend = super().reserve(label, nbytes), LateSlot.lend

        def shifted(start, stop, *, full):
            lease = lend(made, start, stop, full=full)
            lease.tensor = torch.full((stop - start + 1,), 0xAB, dtype=torch.uint8)[1:]
            return lease

        made.lend = shifted
        return made


class SaysItIsResident(LateTier):
    resident = True


class IsResidentElsewhere(DeviceTier):
    def reserve(self, label, nbytes):
        made = super().reserve(label, nbytes)
        made.resident, home = torch.zeros(nbytes, dtype=torch.uint8), DeviceSlot(made.resident)
        made.fetch, made.blank = home.fetch, home.blank
        return made


class AdoptsNothing(LateTier):
    def adopt(self, label, tensor):
        return self.reserve(label, tensor.numel())


class HasNoGrain(LateTier):
    grain = 0


class ReturnsNoHandle(LateTier):
    def reserve(self, label, nbytes):
        made, lend = super().reserve(label, nbytes), LateSlot.lend

        def silent(start, stop, *, full):
            lease = lend(made, start, stop, full=full)
            store = lease.store
            lease.store = lambda: (store(), None)[1]
            return lease

        made.lend = silent
        return made


FAULTS = {
    FetchesBeforeTheStoreArrives: "test_a_later_fetch_waits_for_the_store",
    GivesLeasesOfOneMemory: "test_many_leases_are_under_way",
    StoresWhatIsReleased: "test_released_changes_are_forgotten",
    StoresWholeBlocks: "test_ranges_stored_in_any_order_leave_their_neighbours",
    ForgetsToSettle: "test_settling_waits_for_every_store",
    NeverUsesRoomAgain: "test_freed_room_is_used_again",
    GivesRoomAwayTwice: "test_slots_leave_one_another_alone",
    IsShort: "test_a_slot_knows_its_size_and_device",
    RefusesNothing: "test_nothing_rests_too",
    ClosesOnce: "test_closing_twice_is_harmless",
    IsNotAligned: "test_a_lease_is_flat_bytes",
    SaysItIsResident: "test_resident_slots_are_resident",
    IsResidentElsewhere: "test_resident_slots_are_resident",
    AdoptsNothing: "test_adopts_what_a_tensor_holds",
    HasNoGrain: "test_describes_itself",
    ReturnsNoHandle: "test_handles_tell_when_it_rests",
}
"""Each fault, and the test that is there to catch it."""


def suite(tier):
    class Suite(TierContract):
        def make(self, directory):
            return tier()

        def held(self, tier):
            return getattr(tier, "used", None)

    return Suite


@pytest.mark.parametrize("healthy", [LateTier, lambda: DeviceTier(CPU)])
def test_the_healthy_one_passes(contract, healthy):
    """A tier without a fault fails no test, however late it moves what it moves."""
    assert contract.failures(suite(healthy)) == []


@pytest.mark.parametrize(("fault", "test"), FAULTS.items())
def test_the_fault_is_caught(contract, fault, test):
    """A tier with one fault fails the test that is there for it."""
    assert contract.failures(suite(fault), test), f"{test} passed"


@pytest.mark.parametrize("fault", [FetchesBeforeTheStoreArrives, GivesLeasesOfOneMemory, GivesRoomAwayTwice])
def test_the_property_finds_it_too(contract, fault):
    """What nobody thought of a test for, interleaved operations find."""
    assert contract.failures(suite(fault), "test_it_holds_what_bytearrays_hold")


def test_a_done_handle_is_done():
    """The handle of what needs no waiting, which many tiers give."""
    handle = Done()
    handle.wait()
    assert handle.done()
