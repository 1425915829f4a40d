"""The 8-bit codes by themselves."""

from __future__ import annotations

import pytest
import torch

from powertrain_optimizers.dynamic import BLOCK, DynamicMap, count_blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_comes_back(signed: bool) -> None:
    """255 codes, each of which decodes to a value that is encoded as it."""
    codes = DynamicMap(signed=signed, device=CPU)
    assert len(codes.values) == 255
    assert torch.all(codes.values[1:] > codes.values[:-1])
    numbers = 3.0 * codes.values
    found, scales = codes.encode(numbers)
    assert found.tolist() == list(range(255))
    assert scales.tolist() == [3.0]
    assert torch.equal(codes.decode(found, scales), numbers)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("numel", [1, 255, 256, 257, 1000])
def test_large_numbers_are_near_and_small_ones_stay(signed: bool, numel: int) -> None:
    """In the top decade a number is off by 7 % at most, the largest of each block is exact, and the sign stays."""
    torch.manual_seed(numel)
    numbers = torch.randn(numel) * torch.logspace(-8, 0, numel)
    numbers = numbers if signed else numbers.abs()
    codes = DynamicMap(signed=signed, device=CPU)
    found, scales = codes.encode(numbers)
    assert (found.dtype, found.shape, scales.shape) == (torch.uint8, numbers.shape, (count_blocks(numel),))
    decoded = codes.decode(found, scales)
    for block, (mine, theirs) in enumerate(zip(decoded.split(BLOCK), numbers.split(BLOCK), strict=True)):
        assert scales[block] == theirs.abs().max()
        top = theirs.abs() >= 0.1 * scales[block]
        assert ((mine - theirs).abs()[top] <= 0.07 * theirs.abs()[top]).all()
        assert mine[theirs.abs().argmax()] == theirs[theirs.abs().argmax()]
    if signed:
        assert (decoded * numbers >= 0).all()
    else:
        assert torch.equal(decoded > 0, numbers > 0), "a divisor became zero"


def test_zeros_and_what_is_not_finite() -> None:
    """Blocks of zeros stay; a block with an infinity or NaN cannot pass for numbers."""
    codes = DynamicMap(signed=True, device=CPU)
    zeros, scales = codes.encode(torch.zeros(2 * BLOCK))
    assert torch.equal(codes.decode(zeros, scales), torch.zeros(2 * BLOCK))
    for bad in (float("inf"), float("nan")):
        numbers = torch.ones(2 * BLOCK)
        numbers[3] = bad
        decoded = codes.decode(*codes.encode(numbers))
        assert not decoded[3].isfinite()
        assert torch.equal(decoded[BLOCK:], numbers[BLOCK:])
