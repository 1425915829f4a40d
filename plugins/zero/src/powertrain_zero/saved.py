"""What a checkpoint holds of sharded state: slices of global tensors, by global name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from powertrain.context import Context
from powertrain.roles.checkpoint import CheckpointReader, TensorInfo, TensorSlice
from powertrain.roles.optimizer import FlatOptimizer, blocks_of, device_of_state, granularity_of
from powertrain_zero.chunk import Chunk, Segment
from powertrain_zero.kept import Expected, KeptState
from powertrain_zero.unit import Unit
from powertrain_zero.update import Updater


class SavedState:
    """Lists and loads this rank's slices.

    Args:
        units: what is saved.
        optimizer: whose state is saved with them.
        updater: knows what rests where.
        context: the run.
    """

    def __init__(
        self, units: Sequence[Unit], optimizer: torch.optim.Optimizer, updater: Updater, context: Context
    ) -> None:
        self._units = list(units)
        self._updater = updater
        self._optimizer = optimizer
        self._communicator = context.communicator
        self._blocks = blocks_of(optimizer)
        self._state_dtype = context.recipe.state if granularity_of(optimizer) == "element" else None

    def _chunks(self) -> Iterator[Chunk]:
        for unit in self._units:
            for flat in unit.flats:
                yield from flat.chunks

    def _segments(self) -> Iterator[Segment]:
        for chunk in self._chunks():
            yield from chunk.segments

    def _kept(self, chunk: Chunk) -> KeptState | None:
        """Return what keeps a chunk's state where it does not stay."""
        travel = self._updater.travels.get(chunk)
        return None if travel is None else travel.kept

    def tensors(self) -> list[TensorSlice]:
        """Return slices of parameters (masters) and optimizer state."""
        result: dict[tuple[str, int], TensorSlice] = {}  # pieces of one parameter have the same step count
        for chunk in self._chunks():
            kept = self._kept(chunk)
            for segment in chunk.segments:
                found = [chunk.slice(f"model/{segment.name}", segment)]
                for key, value in self._optimizer.state.get(segment.master, {}).items():
                    if isinstance(value, torch.Tensor):
                        name = f"optimizer/{segment.name}/{key}"
                        found.append(segment.slice(name, value, self._blocks.get(key, 0)))
                if kept is not None:
                    for key, piece in kept.slices_of(segment, segment.name, self._blocks):
                        found.append(attrs.evolve(piece, name=f"optimizer/{segment.name}/{key}"))
                for piece in found:
                    result.setdefault((piece.name, piece.start), piece)
        return list(result.values())

    def values(self) -> dict[str, Any]:
        """Return optimizer state that is no tensor, by parameter and key, of all ranks together."""
        mine: dict[str, Any] = {}
        for segment in self._segments():
            state = self._optimizer.state.get(segment.master, {})
            plain = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
            if plain:
                mine[segment.name] = plain
        everyone: dict[str, Any] = {}
        for part in self._communicator.gather_json(mine, "data", label="optimizer values"):
            everyone.update(part)
        return {name: everyone[name] for name in sorted(everyone)}

    @torch.no_grad()
    def load(self, reader: CheckpointReader) -> list[str]:
        """Fill the slices in one read; the optimizer's state is put in place once all of it is there."""
        group_of = {master: group for group in self._optimizer.param_groups for master in group["params"]}
        keys: dict[str, list[str]] = {}
        for full_name in reader.tensors:
            kind, _, rest = full_name.partition("/")
            name, _, key = rest.rpartition("/")
            if kind == "optimizer":
                keys.setdefault(name, []).append(key)
        wanted: list[TensorSlice] = []
        states: list[tuple[Segment, dict[str, Any]]] = []
        rooms: list[tuple[KeptState, Expected]] = []
        try:
            for chunk in self._chunks():
                kept = self._kept(chunk)
                at_rest: list[tuple[Segment, str, tuple[int, ...], torch.dtype]] = []
                for segment in chunk.segments:
                    wanted.append(chunk.slice(f"model/{segment.name}", segment))
                    mine = keys.get(segment.name, ()) if segment.master in group_of else ()
                    tensors = {key: reader.tensors[f"optimizer/{segment.name}/{key}"] for key in mine}
                    here = {key: info for key, info in tensors.items() if kept is None or not info.shape}
                    at_rest += [
                        (segment, key, *self._form(segment, key, info.shape, info.dtype))
                        for key, info in tensors.items()
                        if key not in here
                    ]
                    state: dict[str, Any] = dict(reader.values.get("optimizer", {}).get(segment.name, {}))
                    for key, info in here.items():
                        full_name = f"optimizer/{segment.name}/{key}"
                        state[key] = self._empty(segment, key, info, group_of[segment.master])
                        wanted.append(self._slice(segment, full_name, key, info, state[key]))
                    states.append((segment, state))
                if kept is not None:
                    rooms.append((kept, kept.expect(at_rest)))
                    wanted += rooms[-1][1].slices("optimizer", self._blocks)
            reader.read(wanted)
        except BaseException:
            for _, room in rooms:
                room.free()
            raise
        for segment, state in states:
            self._optimizer.state.pop(segment.master, None)
            if state:
                self._optimizer.state[segment.master].update(state)
        for kept, room in rooms:
            kept.keep(room)
        return list(self._names(keys))

    def _names(self, keys: Mapping[str, Sequence[str]]) -> Iterator[str]:
        """Yield what all ranks together have loaded."""
        for name, param in (named for unit in self._units for flat in unit.flats for named in flat.named):
            yield f"model/{name}"
            for key in keys.get(name, ()) if param.requires_grad else ():
                yield f"optimizer/{name}/{key}"

    def _slice(self, segment: Segment, name: str, key: str, info: TensorInfo, value: torch.Tensor) -> TensorSlice:
        """Return memory for one piece of state as a slice of the global tensor."""
        block = self._blocks.get(key, 0)
        if block or info.shape == segment.shape:
            return segment.slice(name, value, block)
        return TensorSlice(name, tuple(info.shape), value.view(-1))

    def _form(
        self, segment: Segment, key: str, shape: Sequence[int], dtype: torch.dtype
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and format of one piece of state; another run may have kept it in another format."""
        if block := self._blocks.get(key, 0):
            return (segment.blocks(block),), dtype
        if segment.is_cut(key, shape):
            return tuple(segment.master.shape), self._format(key, segment.master, dtype)
        return tuple(shape), dtype

    def _empty(self, segment: Segment, key: str, info: TensorInfo, group: dict[str, Any]) -> torch.Tensor:
        """Return memory for one piece of state."""
        shape, dtype = self._form(segment, key, info.shape, info.dtype)
        goes_along = key in self._blocks or segment.is_cut(key, info.shape)
        device = segment.master.device
        return torch.empty(shape, dtype=dtype, device=device if goes_along else device_of_state(key, group, device))

    def _format(self, key: str, master: torch.Tensor, saved: torch.dtype) -> torch.dtype:
        """Return the format of state that goes with the elements."""
        if not saved.is_floating_point:
            return saved
        if isinstance(self._optimizer, FlatOptimizer):
            return self._optimizer.format_of(key, master)
        return self._state_dtype or saved
