"""What every accelerator must do, as a class of tests.

::

    class TestToy(AcceleratorContract):
        def make(self):
            return ToyAccelerator()

Tests of an optional part skip when ``capabilities`` does not name it; tests of
devices skip where the host has none.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from powertrain import kernels
from powertrain.errors import AcceleratorError
from powertrain.roles.accelerator import Accelerator
from powertrain.testing import kernel_cases
from powertrain.testing.capability import needs

CAPABILITIES = frozenset({"streams", "pinned", "graphs", "kernels"})
BLOCK = 64 * 2**20
"""Bytes that the memory tests allocate."""


class AcceleratorContract:
    """Tests of one accelerator.

    Attributes:
        counts_memory: whether ``memory`` follows what tensors hold.
    """

    counts_memory: ClassVar[bool] = True

    def make(self) -> Accelerator:
        """Return a new accelerator."""
        raise NotImplementedError

    def ready(self) -> tuple[Accelerator, torch.device]:
        """Return an accelerator and its first device, activated."""
        accelerator = self.make()
        needs(accelerator.device_count() > 0, f"no {accelerator.name} device on this host")
        device = accelerator.device(0)
        accelerator.activate(device)
        return accelerator, device

    # --- devices ------------------------------------------------------------------

    def test_names_itself(self) -> None:
        """It has a name for `[accelerator] use`, and the device type that its devices have."""
        accelerator, device = self.ready()
        assert accelerator.name
        assert accelerator.name == accelerator.name.strip().lower()
        assert device.type == accelerator.device_type

    def test_counts_devices(self) -> None:
        """The number of devices is a fact: not negative, and the same for every instance."""
        count = self.make().device_count()
        assert isinstance(count, int)
        assert count >= 0
        assert self.make().device_count() == count

    def test_every_device_is_usable(self) -> None:
        """Each device that it counts computes."""
        accelerator = self.make()
        for index in range(accelerator.device_count()):
            device = accelerator.device(index)
            accelerator.activate(device)
            total = torch.ones(8, device=device).sum()
            accelerator.synchronize(device)
            assert total.item() == 8.0
            assert total.device.type == accelerator.device_type

    def test_refuses_devices_that_are_not_there(self) -> None:
        """A local rank without a device is an AcceleratorError; only a single device may serve every rank."""
        accelerator = self.make()
        with pytest.raises(AcceleratorError):
            accelerator.device(-1)
        count = accelerator.device_count()
        try:
            beyond = accelerator.device(count)
        except AcceleratorError:
            return
        assert count == 1, f"device {count} of {count} was given out"
        assert beyond == accelerator.device(0)

    def test_synchronize_waits(self) -> None:
        """After ``synchronize``, results are there; waiting for nothing is harmless."""
        accelerator, device = self.ready()
        accelerator.synchronize(device)
        accelerator.synchronize(device)
        square = torch.full((128, 128), 2.0, device=device)
        product = square @ square
        accelerator.synchronize(device)
        assert torch.equal(product.cpu(), torch.full((128, 128), 512.0))

    # --- memory -------------------------------------------------------------------

    def test_memory_is_plausible(self) -> None:
        """Memory is in whole bytes; what is used is part of the peak, what is free part of the total."""
        accelerator, device = self.ready()
        held = torch.ones(1024, device=device)
        memory = accelerator.memory(device)
        for value in (memory.used, memory.peak, memory.total, memory.free):
            assert isinstance(value, int)
            assert value >= 0
        assert memory.used <= memory.peak
        assert memory.free <= memory.total
        del held

    def test_memory_follows_tensors(self) -> None:
        """Holding a tensor raises ``used`` by about its size; freeing it leaves the peak.

        What the allocator keeps of freed tensors may count as used, until ``release_unused``.
        """
        needs(self.counts_memory, "it keeps no account of memory")
        accelerator, device = self.ready()
        accelerator.release_unused(device)
        accelerator.reset_peak_memory(device)
        before = accelerator.memory(device).used
        block = torch.ones(BLOCK, dtype=torch.uint8, device=device)
        accelerator.synchronize(device)
        held = accelerator.memory(device)
        del block
        accelerator.release_unused(device)
        after = accelerator.memory(device)
        assert held.used - before > BLOCK // 2
        assert after.used < held.used - BLOCK // 2
        assert after.peak - before > BLOCK // 2

    def test_peak_memory_starts_anew(self) -> None:
        """``reset_peak_memory`` forgets what was held before and is not held now."""
        needs(self.counts_memory, "it keeps no account of memory")
        accelerator, device = self.ready()
        block = torch.ones(BLOCK, dtype=torch.uint8, device=device)
        accelerator.synchronize(device)
        accelerator.memory(device)
        del block
        accelerator.release_unused(device)
        accelerator.reset_peak_memory(device)
        memory = accelerator.memory(device)
        assert memory.peak - memory.used < BLOCK // 2

    # --- numbers --------------------------------------------------------------------

    def test_trains_in_every_type(self) -> None:
        """Each type that it lists goes through a forward and a backward pass and keeps its type."""
        accelerator, device = self.ready()
        dtypes = accelerator.dtypes()
        assert torch.float32 in dtypes
        for dtype in dtypes:
            weight = torch.ones(4, 4, dtype=dtype, device=device, requires_grad=True)
            loss = (torch.ones(2, 4, dtype=dtype, device=device) @ weight).sum()
            loss.backward()
            accelerator.synchronize(device)
            assert weight.grad is not None
            assert weight.grad.dtype == dtype
            assert torch.equal(weight.grad.cpu().float(), torch.full((4, 4), 2.0))

    def test_computes_what_the_host_computes(self) -> None:
        """Three steps of SGD on a small network agree with the host's to 1e-4."""
        accelerator, device = self.ready()
        losses = [_train(place) for place in (torch.device("cpu"), device)]
        accelerator.synchronize(device)
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)

    # --- random numbers ---------------------------------------------------------------

    def test_equal_seeds_give_equal_numbers(self) -> None:
        """A seed fixes the numbers that follow; another seed gives others."""
        accelerator, device = self.ready()
        draws = []
        for seed in (7, 7, 8):
            accelerator.seed(seed, device)
            draws.append(torch.rand(64, device=device).cpu())
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_random_state_continues(self) -> None:
        """``set_rng_state`` gives again the numbers that followed ``rng_state``."""
        accelerator, device = self.ready()
        accelerator.seed(3, device)
        torch.rand(5, device=device)
        state = accelerator.rng_state(device)
        first = torch.rand(64, device=device).cpu()
        torch.rand(1000, device=device)
        accelerator.set_rng_state(state, device)
        assert torch.equal(torch.rand(64, device=device).cpu(), first)

    def test_random_state_is_a_copy_on_the_host(self) -> None:
        """The state is a uint8 tensor on the host, and drawing numbers does not change it."""
        accelerator, device = self.ready()
        accelerator.seed(3, device)
        state = accelerator.rng_state(device)
        assert state.dtype == torch.uint8
        assert state.device.type == "cpu"
        kept = state.clone()
        torch.rand(1000, device=device)
        assert torch.equal(state, kept)
        assert not torch.equal(accelerator.rng_state(device), kept)

    # --- what it offers -----------------------------------------------------------------

    def test_capabilities_are_known(self) -> None:
        """``capabilities`` names only parts that exist."""
        assert self.make().capabilities <= CAPABILITIES

    def test_facts_are_strings(self) -> None:
        """``describe`` and ``backends`` speak in strings."""
        accelerator = self.make()
        assert all(isinstance(word, str) for pair in accelerator.describe().items() for word in pair)
        assert accelerator.backends()
        assert all(isinstance(name, str) for name in accelerator.backends())

    def test_streams_order_work(self) -> None:
        """Work on a stream that waits for another's event sees that other's results."""
        accelerator, device = self.ready()
        needs("streams" in accelerator.capabilities, "it has no streams")
        first, second = accelerator.stream(device), accelerator.stream(device)
        square = torch.full((256, 256), 1.0, device=device)
        accelerator.synchronize(device)
        with accelerator.use_stream(first):
            for _ in range(4):
                square = square @ square / 256
        accelerator.wait(second, accelerator.record(first))
        with accelerator.use_stream(second):
            doubled = square * 2
        accelerator.synchronize(device)
        assert torch.equal(doubled.cpu(), torch.full((256, 256), 2.0))

    def test_pinned_memory_holds_the_tensor(self) -> None:
        """``pin`` returns host memory with the same content, from which copies reach the device."""
        accelerator, device = self.ready()
        needs("pinned" in accelerator.capabilities, "it pins no memory")
        source = torch.arange(1000.0)
        pinned = accelerator.pin(source)
        assert pinned.device.type == "cpu"
        there = pinned.to(device, non_blocking=True)
        accelerator.synchronize(device)
        assert torch.equal(there.cpu(), source)

    def test_unknown_kernels_are_declined(self) -> None:
        """A kernel that it does not have is None, which asks for the reference."""
        assert self.make().kernel("no such kernel") is None

    @pytest.mark.parametrize("name", tuple(kernels.NAMES))
    def test_kernels_agree_with_their_references(self, name: str) -> None:
        """Each kernel that it offers gives what the reference gives, and writes nowhere else."""
        accelerator, device = self.ready()
        own = accelerator.kernel(name)
        if own is None:
            pytest.skip(f"it leaves {name} to the reference")
        assert "kernels" in accelerator.capabilities, f"it offers {name}, and its capabilities say nothing of kernels"
        found = kernel_cases.run(name, own, device)
        expected = kernel_cases.run(name, kernels.reference(name), torch.device("cpu"))
        wrong = kernel_cases.difference(name, found, expected)
        assert wrong is None, wrong

    def test_undeclared_parts_are_not_there(self) -> None:
        """A part that ``capabilities`` does not name gives what the role's defaults give."""
        accelerator, device = self.ready()
        needs("streams" not in accelerator.capabilities, "it has streams")
        assert accelerator.stream(device) is None
        with accelerator.use_stream(None):
            assert torch.ones(2, device=device).sum().item() == 2.0
        accelerator.wait(None, accelerator.record(None))


def _train(device: torch.device) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    first, second, data = (torch.randn(*shape, generator=generator) for shape in ((16, 8), (8, 1), (32, 16)))
    weights: list[Any] = [w.to(device).requires_grad_() for w in (first, second)]
    inputs = data.to(device)
    losses = []
    for _ in range(3):
        loss = ((inputs @ weights[0]).tanh() @ weights[1]).square().mean()
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 0.1 * gradient
        losses.append(loss.item())
    return losses
