"""Sums of squares and combinations of several arrays, against the reference."""

from __future__ import annotations

import pytest
import torch

from powertrain.kernels import reference
from powertrain_triton.sums import Kernels
from powertrain_triton.table import Tables

sums = Kernels(Tables())

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def test_sums_of_squares_are_those_of_fp64(device: torch.device) -> None:
    """Of tensors of several types, lengths and alignments; equal inputs give equal bits."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for length, scale in ((1, 1.0), (1024, 1e4), (5000, 1e-3), (0, 1.0), (333, 1e-25), (2049, 1e15)):
        for dtype in FLOATS if scale < 1e5 else FLOATS[:2]:
            x = torch.randn(length + 1, generator=generator) * scale
            tensors += [x.to(device, dtype)[1:], x.to(device, dtype)[:-1]]
    tensors += [torch.tensor([1.0, float("inf")], device=device), torch.tensor([float("nan")] * 3, device=device)]
    found = sums.sums_of_squares(tensors)
    torch.testing.assert_close(found, reference("sums_of_squares")(tensors), rtol=2**-23, atol=0.0, equal_nan=True)
    assert torch.equal(found.nan_to_num(), sums.sums_of_squares(tensors).nan_to_num())
    assert found.dtype == torch.float32


def test_sums_of_squares_of_nothing_and_of_doubles(device: torch.device) -> None:
    """No tensors give no sums, and a type that kernels do not take goes to the reference."""
    assert sums.sums_of_squares([]).shape == (0,)
    assert sums.sums_of_squares([torch.full((3,), 2.0, dtype=torch.float64, device=device)]).tolist() == [12.0]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int32, torch.uint8, torch.int64])
@pytest.mark.parametrize("how", ["sum", "mean", "max", "min"])
def test_combinations_are_the_references_bits(dtype: torch.dtype, how: str, device: torch.device) -> None:
    """For two and more terms, aligned or not, with what is no number among them, and in place."""
    generator = torch.Generator().manual_seed(1)
    for terms, length, shift in ((2, 1024, 0), (3, 1500, 1), (5, 7, 0), (2, 0, 0)):
        rows = [
            (torch.randn(length + shift, generator=generator) * 9).to(dtype).to(device)[shift:] for _ in range(terms)
        ]
        if dtype.is_floating_point and length > 8:
            rows[0][3] = rows[1][5] = float("nan")
            rows[0][4], rows[1][4] = float("inf"), float("-inf")
        expected = torch.empty_like(rows[0])
        reference("combine")(expected, rows, how)
        found = torch.empty_like(expected)
        sums.combine(found, rows, how)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        sums.combine(rows[-1], rows, how)
        torch.testing.assert_close(rows[-1], expected, rtol=0, atol=0, equal_nan=True)


def test_what_cannot_be_combined_is_an_error() -> None:
    """Arrays of two lengths never reach the device."""
    with pytest.raises(ValueError, match="differs in type, length"):
        sums.combine(torch.zeros(3), [torch.zeros(3), torch.zeros(4)])
