"""Blockwise quantization: what comes back, and what the odd values come back as."""

from __future__ import annotations

import pytest
import torch

from powertrain import kernels
from powertrain.kernels.blockwise import BLOCK, Blockwise

CODECS = [Blockwise(8), Blockwise(4), Blockwise(8, 32), Blockwise(4, 64)]
LARGEST = torch.finfo(torch.float32).max


def trip(codec: Blockwise, elements: torch.Tensor) -> torch.Tensor:
    """Return what is left of ``elements`` after they have travelled."""
    rows = codec.encode(elements)
    assert rows.dtype == torch.uint8
    assert rows.shape == (*elements.shape[:-1], codec.row_bytes(elements.shape[-1]))
    result = torch.full(elements.shape, torch.nan, dtype=elements.dtype)
    codec.decode(rows, result)
    return result


def block_with(codec: Blockwise, *values: float) -> torch.Tensor:
    """Return one block that begins with ``values``; the rest are small numbers."""
    block = torch.linspace(-1.0, 1.0, codec.block)
    block[: len(values)] = torch.tensor(values)
    return block


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_an_element_is_off_by_half_a_step_at_most(codec: Blockwise, dtype: torch.dtype) -> None:
    """The error is half of the block's largest magnitude over 127 or 7, whatever other blocks hold."""
    generator = torch.Generator().manual_seed(1)
    magnitudes = torch.logspace(-4, 3, 6).repeat_interleave(codec.block)
    elements = (torch.randn(3, 6 * codec.block, generator=generator) * magnitudes).to(dtype)
    found = trip(codec, elements).double().unflatten(-1, (6, codec.block))
    expected = elements.double().unflatten(-1, (6, codec.block))
    step = expected.abs().amax(-1, keepdim=True) / (127 if codec.bits == 8 else 7)
    rounding = 2 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-6
    assert bool(((found - expected).abs() <= step * (0.5 + 1e-6) + expected.abs() * rounding).all())
    assert bool((found - expected).any()), "nothing was quantized"


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_integer_survives(codec: Blockwise) -> None:
    """All integers of the format come back exactly, each in its place: the packing loses and swaps nothing."""
    top = 127 if codec.bits == 8 else 7
    elements = (torch.arange(2 * codec.block) * 5 % (2 * top + 1) - top).float()
    elements[0] = elements[codec.block] = top
    assert torch.equal(trip(codec, elements), elements)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_bytes_of_a_row(codec: Blockwise) -> None:
    """A row has the elements' bits and four bytes a block; at 256, a half and a quarter of fp16 with 2 % on top."""
    numel = 4 * codec.block
    assert codec.row_bytes(numel) == numel * codec.bits // 8 + 16
    assert Blockwise(8).row_bytes(BLOCK * 100) / (2 * BLOCK * 100) == pytest.approx(0.5, rel=0.02)
    assert Blockwise(4).row_bytes(BLOCK * 100) / (2 * BLOCK * 100) == pytest.approx(0.25, rel=0.04)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_equal_elements_give_equal_bytes(codec: Blockwise) -> None:
    """Quantization is deterministic, and does not depend on where the elements lie."""
    generator = torch.Generator().manual_seed(2)
    elements = torch.randn(2, 3, 2 * codec.block, generator=generator)
    rows = codec.encode(elements)
    assert torch.equal(codec.encode(elements.clone()), rows)
    assert torch.equal(codec.encode(elements.transpose(0, 1)), rows.transpose(0, 1))
    assert torch.equal(codec.encode(elements[1, 2]), rows[1, 2])


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_zeros_constants_and_extremes(codec: Blockwise) -> None:
    """Zeros are zeros, constants are themselves, the smallest vanish, and the largest stay finite."""
    zeros = torch.zeros(codec.block)
    assert torch.equal(trip(codec, zeros), zeros)
    for constant in (3.7, -3.7, 1e-30, -LARGEST, LARGEST):
        block = torch.full((codec.block,), constant)
        torch.testing.assert_close(trip(codec, block), block, rtol=1e-6, atol=0.0)
    smallest = torch.full((codec.block,), 1e-45)
    assert bool((trip(codec, smallest).abs() <= 1e-43).all())
    huge = block_with(codec, LARGEST, -LARGEST)
    assert bool(trip(codec, huge).isfinite().all())
    for dtype in (torch.float16, torch.bfloat16):
        most = torch.finfo(dtype).max
        found = trip(codec, torch.full((codec.block,), most, dtype=dtype))
        assert float(found[0]) == most


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_what_is_not_finite_stays_so(codec: Blockwise, bad: float) -> None:
    """A block with a bad element comes back without a finite one; its neighbours are as they were."""
    elements = torch.cat([block_with(codec), block_with(codec, 0.5, bad, 0.0), block_with(codec, 2.0)])
    found = trip(codec, elements)
    spoilt = found[codec.block : 2 * codec.block]
    assert not bool(spoilt.isfinite().any())
    clean = trip(codec, torch.where(elements.isfinite(), elements, 0.0))
    assert torch.equal(found[: codec.block], clean[: codec.block])
    assert torch.equal(found[2 * codec.block :], clean[2 * codec.block :])


def test_doubles_beyond_fp32_count_as_infinite() -> None:
    """A number that the scale cannot hold does not come back as another number."""
    elements = torch.full((BLOCK,), 1e300, dtype=torch.float64)
    assert not bool(trip(Blockwise(8), elements).isfinite().any())


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_adding_up(codec: Blockwise) -> None:
    """``accumulate`` adds in fp32 what ``decode`` would give."""
    generator = torch.Generator().manual_seed(3)
    rows = codec.encode(torch.randn(2, codec.block, generator=generator))
    first, second, total = (torch.empty(codec.block) for _ in range(3))
    codec.decode(rows[0], first)
    codec.decode(rows[1], second)
    codec.decode(rows[0], total)
    codec.accumulate(rows[1], total)
    assert torch.equal(total, first + second)


def test_the_devices_kernels_are_called() -> None:
    """A codec with kernels of a device calls these, once a row, with the row's parts; equality asks for the format."""
    calls: list[tuple[object, ...]] = []

    def quantize(values: torch.Tensor, data: torch.Tensor, scales: torch.Tensor, *, bits: int, block: int) -> None:
        calls.append(("quantize", values.numel(), data.numel(), scales.numel(), bits, block))
        kernels.reference("quantize")(values, data, scales, bits=bits, block=block)

    def dequantize(*tensors: torch.Tensor, bits: int, block: int, add: bool = False) -> None:
        calls.append(("dequantize", *(tensor.numel() for tensor in tensors), bits, block, add))
        kernels.reference("dequantize")(*tensors, bits=bits, block=block, add=add)

    codec = Blockwise(4, 64, quantize, dequantize)
    assert codec == Blockwise(4, 64)
    elements = torch.linspace(-1.0, 1.0, 256).view(2, 128)
    rows = codec.encode(elements)
    assert torch.equal(rows, Blockwise(4, 64).encode(elements))
    codec.decode(rows, torch.empty(2, 128))
    codec.accumulate(rows[0], torch.empty(128))
    assert calls == [
        *[("quantize", 128, 64, 2, 4, 64)] * 2,
        *[("dequantize", 64, 2, 128, 4, 64, False)] * 2,
        ("dequantize", 64, 2, 128, 4, 64, True),
    ]
