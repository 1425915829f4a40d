"""Quantizers, which agree with the reference bit by bit."""

from __future__ import annotations

import pytest
import torch

from powertrain.kernels import reference
from powertrain.kernels.blockwise import Blockwise
from powertrain_triton import blockwise

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def blocks_of_all_kinds(dtype: torch.dtype, block: int, seed: int) -> torch.Tensor:
    """Return blocks of plain and of extreme numbers, ties between two integers included."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.finfo(dtype)
    x = torch.randn(16, block, generator=generator, dtype=torch.float64)
    x *= 10.0 ** torch.randint(-9, 9, (16, 1), generator=generator)
    x[0] = 0.0
    x[1, 1], x[2, 3], x[3, 0], x[4, block - 1] = float("inf"), float("-inf"), float("nan"), float("nan")
    x[5] = kind.max
    x[6] = x[6].sign() * kind.smallest_normal * torch.rand(block, generator=generator)
    x[7] = kind.tiny * kind.eps * torch.arange(block)
    x[8] = torch.arange(block) % 15 - 7.5  # a scale of 7.5 / 7
    x[9] = (torch.arange(block) % 255 - 127) / 2  # a scale of 1/2: every second one is a tie at four bits
    x[10, :2] = torch.tensor([127.0, -0.0])
    return x.to(dtype).flatten()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [256, 64, 24, 8, 1024])
def test_bytes_and_numbers_are_the_references(
    dtype: torch.dtype, bits: int, block: int, device: torch.device, rounds: int
) -> None:
    """For every type, width and length of a block, there, back, and added to something."""
    for seed in range(rounds):
        values = blocks_of_all_kinds(dtype, block, seed).to(device)
        numel, sides = values.numel(), (blockwise, None)
        data = [torch.zeros(numel * bits // 8, dtype=torch.uint8, device=device) for _ in sides]
        scales = [torch.zeros(numel // block, device=device) for _ in sides]
        blockwise.quantize(values, data[0], scales[0], bits=bits, block=block)
        reference("quantize")(values, data[1], scales[1], bits=bits, block=block)
        assert torch.equal(*data)
        torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)
        for add in (False, True):
            outs = [values.nan_to_num().roll(1).clone() for _ in sides]
            blockwise.dequantize(data[0], scales[0], outs[0], bits=bits, block=block, add=add)
            reference("dequantize")(data[1], scales[1], outs[1], bits=bits, block=block, add=add)
            torch.testing.assert_close(*outs, rtol=0, atol=0, equal_nan=True)


def test_a_row_of_bytes_takes_the_kernels(device: torch.device) -> None:
    """``Blockwise``, which cuts rows of bytes into elements and scales, runs on the kernels."""
    kernels = {"quantize": blockwise.quantize, "dequantize": blockwise.dequantize}
    mine, theirs = Blockwise(4, **kernels), Blockwise(4)
    rows = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(mine.encode(rows), theirs.encode(rows))
    outs = torch.ones(2, 3, 512, device=device)
    mine.accumulate(mine.encode(rows), outs[0])
    theirs.accumulate(theirs.encode(rows), outs[1])
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize(
    ("numel", "data", "scales", "bits"), [(512, 511, 2, 8), (512, 512, 1, 8), (300, 300, 2, 8), (512, 128, 2, 2)]
)
def test_what_does_not_fit_is_refused(numel: int, data: int, scales: int, bits: int) -> None:
    """What would be written beyond a tensor's end is an error before anything runs."""
    places = torch.zeros(data, dtype=torch.uint8), torch.zeros(scales)
    with pytest.raises(ValueError, match=r"do not fit|no quantization"):
        blockwise.quantize(torch.zeros(numel), *places, bits=bits, block=256)
    with pytest.raises(ValueError, match=r"do not fit|no quantization"):
        blockwise.dequantize(*places, torch.zeros(numel), bits=bits, block=256)
