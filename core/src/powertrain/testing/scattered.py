"""A model whose parameters rest in odd pieces on several ranks, for the tests of what puts them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from powertrain.access import adopt, keeping_writes
from powertrain.roles.checkpoint import CheckpointReader, TensorSlice
from powertrain.roles.communicator import Communicator
from powertrain.roles.optimizer import OptimizerWrapper, Update
from powertrain.testing.loopback import LoopbackWorld


class OddNet(nn.Module):
    """Odd shapes, a scalar, an empty tensor, tied and frozen parameters, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.odd = nn.Parameter(torch.randn(7, 5, 3, generator=generator))
        self.row = nn.Linear(4, 3)
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Parameter(torch.arange(5.0), requires_grad=False)
        self.norm = nn.BatchNorm1d(2)
        self.late = nn.Module()
        self.late.tied = self.row.weight
        self.late.norm = self.norm
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        with torch.no_grad():
            for param in self.row.parameters():
                param.normal_(generator=generator)
            # What only copies of the bits keep.
            self.odd[0, 0, 0], self.odd[6, 4, 2], self.odd[3, 0, 1] = -0.0, math.nan, -math.inf


def gradient_of(value: torch.Tensor) -> torch.Tensor:
    """Return the gradient that ``Scattered`` holds of a parameter with this value."""
    return value.detach() + 10


def moment_of(value: torch.Tensor) -> torch.Tensor:
    """Return the ``exp_avg`` that ``Scattered`` holds of a parameter with this value."""
    return (value.detach() + 20).double()


class Scattered(OptimizerWrapper):
    """Holds odd flat slices: each parameter is cut elsewhere; it trains nothing.

    Outside ``gathered`` the model's parameters are NaN. Frozen parameters and ``scalar`` have neither a gradient nor
    optimizer state, of which a rank without elements lists nothing.

    Args:
        model: whose parameters are cut, and adopted.
        communicator: connects the ranks.
        nobody: the group that holds no elements.
        groups: as many neighbouring ranks hold the same slices.

    Attributes:
        names: each parameter's name.
        kept: each parameter's first element on this rank, and its flat slices by key.
        published: the calls of ``publish``.
    """

    def __init__(
        self, model: nn.Module, communicator: Communicator, *, nobody: int | None = None, groups: int = 1
    ) -> None:
        self.optimizer = torch.optim.SGD(model.parameters())
        self.names = {param: name for name, param in model.named_parameters()}
        self.kept: dict[nn.Parameter, tuple[int, dict[str, torch.Tensor]]] = {}
        self.published = 0
        self._communicator = communicator
        self._nobody = nobody
        self._groups = groups
        self._open: dict[nn.Parameter, bool] = {}  # whether it may be written
        for turn, (param, name) in enumerate(self.names.items()):
            start, stop = self._cut(param.numel(), turn)
            cut = {"value": param.detach().reshape(-1)[start:stop].clone()}
            if param.requires_grad and name != "scalar":
                cut["grad"] = gradient_of(param).reshape(-1)[start:stop].clone()
                if start < stop or not param.numel():
                    cut["optimizer/exp_avg"] = moment_of(param).reshape(-1)[start:stop].clone()
                    cut["optimizer/step"] = torch.tensor([4.0])
            self.kept[param] = (start, cut)
        self._put_away(self.names)
        adopt(model, self, communicator)

    def _cut(self, numel: int, turn: int) -> tuple[int, int]:
        """Cut unevenly, in another order of ranks for each parameter."""
        size, index = (n // self._groups for n in (self._communicator.size("data"), self._communicator.index("data")))
        holders = [group for group in range(size) if group != self._nobody]
        if index not in holders:
            return min(1, numel), min(1, numel)
        place = (holders.index(index) + turn) % len(holders)
        piece = numel // len(holders) + 1
        return min(place * piece, numel), min((place + 1) * piece, numel)

    def parts(self, param: nn.Parameter) -> dict[str, TensorSlice]:
        """Return the slices themselves."""
        (start, cut), name, shape = self.kept[param], self.names[param], tuple(param.shape)
        return {
            key: TensorSlice(name, (), tensor) if key == "optimizer/step" else TensorSlice(name, shape, tensor, start)
            for key, tensor in cut.items()
        }

    def publish(self) -> None:
        """Refresh what is whole, and not about to be written."""
        self.published += 1
        for param in self.names:
            if self._open.get(param) is False:
                self._bring(param)

    @contextmanager
    def _gather(self, params: Sequence[nn.Parameter], write: bool) -> Iterator[None]:
        for param in params:
            assert param not in self._open, f"{self.names[param]} is whole already"
            self._open[param] = write
            self._bring(param)
        try:
            with keeping_writes(self, params, self._communicator) if write else nullcontext():
                yield
        finally:
            for param in params:
                del self._open[param]
            self._put_away(params)

    def gathered(self, params: Sequence[nn.Parameter], *, write: bool = False) -> Any:
        """Fill the parameters, and make them NaN again."""
        return self._gather(params, write)

    @torch.no_grad()
    def _put_away(self, params: Iterable[nn.Parameter]) -> None:
        for param in params:
            param.fill_(math.nan)

    def _bring(self, param: nn.Parameter) -> None:
        """Fill a parameter from all slices, by other means than those under test."""
        start, cut = self.kept[param]
        size = self._communicator.size("data")
        mine = torch.zeros(param.numel(), dtype=torch.int32)
        mine[start : start + cut["value"].numel()] = cut["value"].view(torch.int32)
        every = torch.empty(size * param.numel(), dtype=torch.int32)
        self._communicator.all_gather(every, mine).wait()
        rows = every.view(size, param.numel())[:: self._groups]
        whole = rows.sum(0, dtype=torch.int32).view(torch.float32)
        param.detach().copy_(whole.view(param.shape))

    def begin(self, *, last: bool, once: bool = False) -> None:
        """It trains nothing."""
        raise NotImplementedError

    def step(self, *, grad_scale: float, clip: float | None, check_overflow: bool) -> Update:
        """It trains nothing."""
        raise NotImplementedError

    def discard(self) -> None:
        """It gathers no gradients."""

    def tensors(self) -> list[TensorSlice]:
        """It saves nothing."""
        raise NotImplementedError

    def load(self, reader: CheckpointReader) -> list[str]:
        """It loads nothing."""
        raise NotImplementedError


def on_scattered_ranks(ranks: int, body: Callable[[OddNet, Scattered, Communicator], Any], **cut: int) -> list[Any]:
    """Run ``body(model, wrapper, communicator)`` on each of ``ranks`` threads, with a scattered ``OddNet``."""

    def run(communicator: Communicator) -> Any:
        model = OddNet()
        return body(model, Scattered(model, communicator, **cut), communicator)

    return LoopbackWorld(ranks).run(run)


CUTS: list[tuple[int, dict[str, int]]] = [
    (1, {}),
    (2, {}),
    (3, {}),
    (2, {"nobody": 1}),
    (3, {"nobody": 0}),
    (4, {"groups": 2}),
]
"""Numbers of ranks, each with a way to cut."""


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two tensors have the same shape, type and bits."""
    a, b = (tensor.detach().contiguous().view(-1) for tensor in (found, expected))
    if found.shape != expected.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
