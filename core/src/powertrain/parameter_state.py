"""What there is of one parameter: its value, its gradient and the optimizer's tensors, wherever they rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from powertrain.access import Home, home_of
from powertrain.errors import EngineError
from powertrain.pieces import FlatViews, Place, assemble, exchange, index
from powertrain.roles.checkpoint import TensorSlice
from powertrain.roles.optimizer import OptimizerWrapper
from powertrain.text import did_you_mean


class _Source(Protocol):
    """Where a parameter's slices come from."""

    name: str

    def parts(self) -> dict[str, TensorSlice]:
        """Return this rank's slices by key."""

    def publish(self) -> None:
        """Make the model follow what was written into them."""

    def whole(self, key: str, piece: TensorSlice | None) -> torch.Tensor:
        """Return the whole tensor of one key."""


class _Held:
    """A parameter that an engine holds."""

    def __init__(self, home: Home) -> None:
        self.name = home.name
        self._home = home
        self._places: dict[str, list[Place | None]] = {}

    def _wrapper(self) -> OptimizerWrapper:
        if not self._home.is_current():
            raise EngineError(
                "the engine that held this parameter is closed",
                where=self.name,
                remedy="call powertrain.state again: it then returns the plain parameter",
            )
        return self._home.wrapper

    def parts(self) -> dict[str, TensorSlice]:
        return self._wrapper().parts(self._home.param)

    def publish(self) -> None:
        self._wrapper().publish()

    def whole(self, key: str, piece: TensorSlice | None) -> torch.Tensor:
        communicator = self._home.communicator
        name = self.name if key == "value" else f"{key} of {self.name}"
        if key not in self._places:
            mine = {key: Place.of(piece) for key, piece in self.parts().items()}
            self._places.update(exchange(mine, communicator, f"places of {self.name}"))
        places = self._places.get(key)
        if places is None:
            raise KeyError(f"no rank has {name}")
        if (None if piece is None else Place.of(piece)) != places[communicator.index("data")]:
            raise EngineError(
                f"{name} rests elsewhere than before", remedy="call powertrain.state again, on every rank"
            )
        return assemble(piece, places, communicator, name)


class _Plain:
    """A parameter that no engine holds."""

    def __init__(self, param: torch.Tensor) -> None:
        self.name = ""
        self._param = param
        self._views = FlatViews()

    def parts(self) -> dict[str, TensorSlice]:
        result = {"value": self._views.lend(self.name, self._param)}
        if self._param.grad is not None:
            result["grad"] = self._views.lend(self.name, self._param.grad)
        return result

    def publish(self) -> None:
        self._views.put_back()

    def whole(self, key: str, piece: TensorSlice | None) -> torch.Tensor:
        if piece is None:
            raise KeyError(f"the parameter has no {key}")
        return piece.tensor.clone().view(piece.shape)


class StateView:
    """One tensor of a parameter's state: its value, its gradient, or one of the optimizer's.

    It shows what is there now: after a step, the state after the step.

    Attributes:
        name: the parameter's global name; empty where no engine holds it.
    """

    def __init__(self, source: _Source, key: str, param: torch.Tensor) -> None:
        self.name = source.name
        self._source = source
        self._key = key
        self._nothing = TensorSlice(self.name, tuple(param.shape), torch.empty(0, dtype=param.dtype))

    def _piece(self) -> TensorSlice:
        return self._source.parts().get(self._key, self._nothing)

    @property
    def local(self) -> torch.Tensor:
        """This rank's flat slice, which may be empty.

        It may be written; call ``publish`` afterwards, which brings home what was written into the last
        ``local``: where a whole tensor is not contiguous in memory, this is a copy.
        """
        return self._piece().tensor

    @property
    def start(self) -> int:
        """The first element of ``local`` in the whole tensor, in row-major order."""
        return self._piece().start

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(self._piece().shape)

    @property
    def dtype(self) -> torch.dtype:
        """The element type."""
        return self._piece().tensor.dtype

    def full(self) -> torch.Tensor:
        """Return a copy of the whole tensor, the same bits on every rank.

        Collective: every data rank must call it. The first call also tells the ranks who holds what.

        Raises:
            EngineError: the engine is closed, or the tensor is no longer there.
            KeyError: no rank has such a tensor.
        """
        return self._source.whole(self._key, self._source.parts().get(self._key))

    def write(self, tensor: torch.Tensor, *, publish: bool = True) -> None:
        """Replace the whole tensor: each rank keeps its slice, and the model follows.

        Collective: every rank must call it, with the same tensor.

        Args:
            tensor: the new values, of the whole shape; converted to ``dtype``.
            publish: let the model follow now. When many tensors are written, leave it to the last.

        Raises:
            EngineError: the shape is another one, or the engine is closed.
        """
        piece = self._source.parts().get(self._key)
        if piece is not None:
            if tuple(tensor.shape) != tuple(piece.shape):
                raise EngineError(
                    "what is written has another shape than the parameter's state",
                    where=f"{self._key} of {self.name or 'a plain parameter'}",
                    expected=str(tuple(piece.shape)),
                    found=str(tuple(tensor.shape)),
                    remedy="give the whole tensor on every rank; its own slice is `local`",
                )
            for box, chunk in piece.chunks():
                chunk.copy_(tensor.detach()[index(box)])
        if publish:
            self.publish()

    def publish(self) -> None:
        """Make the model follow everything that was written into slices; every rank must call it."""
        self._source.publish()


class OptimizerState(Mapping[str, StateView]):
    """The optimizer's tensors of one parameter, by key ("exp_avg", "step", …).

    A rank that holds nothing of the parameter may list fewer keys than others, but has a view for every key.
    """

    def __init__(self, source: _Source, param: torch.Tensor) -> None:
        self._source = source
        self._param = param

    def _keys(self, parts: Mapping[str, TensorSlice]) -> list[str]:
        return [key.removeprefix("optimizer/") for key in parts if key.startswith("optimizer/")]

    def __getitem__(self, key: str) -> StateView:
        parts = self._source.parts()
        keys = self._keys(parts)
        # A rank without elements has no state to look keys up in; it must still take part in `full`.
        if key not in keys and (parts["value"].tensor.numel() or not self._param.numel() or not self._source.name):
            there = ", ".join(keys) or "none"
            raise KeyError(f"no optimizer tensor {key!r}{did_you_mean(key, keys)}; there are: {there}")
        return StateView(self._source, f"optimizer/{key}", self._param)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys(self._source.parts()))

    def __len__(self) -> int:
        return len(self._keys(self._source.parts()))


class ParameterState:
    """What there is of one parameter; made by ``powertrain.state``.

    Attributes:
        name: its global name; empty where no engine holds it.
    """

    def __init__(self, param: torch.Tensor) -> None:
        home = home_of(param)
        self._param = param
        self._source: _Source = _Plain(param) if home is None else _Held(home)
        self.name = self._source.name

    @property
    def value(self) -> StateView:
        """The parameter itself, in the precision that the optimizer updates."""
        return StateView(self._source, "value", self._param)

    @property
    def grad(self) -> StateView | None:
        """The mean gradient over the global batch, as the last update saw it; None where there is none.

        Unscaled and clipped. There from the end of a step until the next forward pass.
        """
        return StateView(self._source, "grad", self._param) if "grad" in self._source.parts() else None

    @property
    def optimizer(self) -> OptimizerState:
        """The optimizer's tensors; none before the first step."""
        return OptimizerState(self._source, self._param)


def state(param: torch.Tensor) -> ParameterState:
    """Return the value, the gradient and the optimizer's tensors of a parameter, wherever they rest.

    Local; of what it returns, ``full``, ``write`` and ``publish`` are collective: every rank must call them, in
    the same order. A parameter that no engine holds is shown as it is.
    """
    return ParameterState(param)
