"""What the tests of checkpoint stores save: tensors whose numbers tell their place, cut unevenly."""

from __future__ import annotations

import torch

from powertrain.roles.checkpoint import Snapshot, TensorSlice
from powertrain.roles.communicator import Communicator

SHAPES: dict[str, tuple[int, ...]] = {
    "model/odd": (7, 5, 3),
    "model/row": (11,),
    "model/scalar": (),
    "optimizer/odd/exp_avg": (7, 5, 3),
}
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def content(name: str, dtype: torch.dtype = torch.float32, *, plus: int = 0) -> torch.Tensor:
    """Return the global tensor called ``name``: numbers that tell their place."""
    shape = SHAPES[name]
    numbers = torch.arange(torch.Size(shape).numel()) + plus
    numbers = numbers % 2 if dtype == torch.bool else numbers % 100
    return numbers.to(dtype).view(shape)


def cut(numel: int, index: int, size: int) -> tuple[int, int]:
    """Cut a length into uneven flat pieces, some of which may be empty."""
    piece = -(-numel // size) + 1
    return min(index * piece, numel), min((index + 1) * piece, numel)


def own(communicator: Communicator, *, fill: bool, plus: int = 0) -> list[TensorSlice]:
    """Return this rank's slices, with their content or with zeros to be filled."""
    slices = []
    for name, shape in SHAPES.items():
        whole = content(name, plus=plus).reshape(-1)
        start, stop = cut(whole.numel(), communicator.rank, communicator.world_size)
        tensor = whole[start:stop].clone() if fill else torch.zeros(stop - start)
        slices.append(TensorSlice(name, shape, tensor, start))
    return slices


def snapshot(communicator: Communicator, *, plus: int = 0) -> Snapshot:
    """Return what one rank saves."""
    return Snapshot(
        tensors=own(communicator, fill=True, plus=plus),
        values={"step": 10 + plus, "nested": {"list": [1, 2.5, None, True, "ä"]}},
        rank_values={"rank": communicator.rank},
    )


def matches(found: list[TensorSlice], *, plus: int = 0) -> None:
    """Assert that slices hold what was saved, bit by bit."""
    for piece in found:
        whole = content(piece.name, plus=plus).reshape(-1)
        expected = whole[piece.start : piece.start + piece.tensor.numel()]
        assert torch.equal(piece.tensor, expected), f"{piece.name}: {piece.tensor} in place of {expected}"
