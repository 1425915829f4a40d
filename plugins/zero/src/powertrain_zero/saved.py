"""What a checkpoint holds of sharded state: slices of global tensors, by global name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from powertrain.context import Context
from powertrain.roles.checkpoint import CheckpointReader, TensorSlice
from powertrain.roles.optimizer import FlatOptimizer, blocks_of, device_of_state, granularity_of
from powertrain_zero.flat import Segment
from powertrain_zero.unit import Unit


class SavedState:
    """Lists and loads this rank's slices.

    Args:
        units: what is saved.
        optimizer: whose state is saved with them.
        context: the run.
    """

    def __init__(self, units: Sequence[Unit], optimizer: torch.optim.Optimizer, context: Context) -> None:
        self._units = list(units)
        self._optimizer = optimizer
        self._communicator = context.communicator
        self._blocks = blocks_of(optimizer)
        self._state_dtype = context.recipe.state if granularity_of(optimizer) == "element" else None

    def _segments(self) -> Iterator[Segment]:
        for unit in self._units:
            for flat in unit.flats:
                yield from flat.segments

    def tensors(self) -> list[TensorSlice]:
        """Return slices of parameters (masters) and optimizer state."""
        result = []
        for segment in self._segments():
            result.append(segment.slice(f"model/{segment.name}", segment.master))
            for key, value in self._optimizer.state.get(segment.master, {}).items():
                if isinstance(value, torch.Tensor):
                    result.append(segment.slice(f"optimizer/{segment.name}/{key}", value, self._blocks.get(key, 0)))
        return result

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
        segments = list(self._segments())
        group_of = {master: group for group in self._optimizer.param_groups for master in group["params"]}
        keys: dict[str, list[str]] = {}
        for full_name in reader.tensors:
            kind, _, rest = full_name.partition("/")
            name, _, key = rest.rpartition("/")
            if kind == "optimizer":
                keys.setdefault(name, []).append(key)
        wanted: list[TensorSlice] = []
        names: dict[str, None] = {}
        states: list[tuple[Segment, dict[str, Any]]] = []
        plain = reader.values.get("optimizer", {})
        for unit in self._units:
            for flat in unit.flats:
                for name, param in flat.named:
                    names[f"model/{name}"] = None
                    if param.requires_grad:
                        names.update(dict.fromkeys(f"optimizer/{name}/{key}" for key in keys.get(name, ())))
        for segment in segments:
            wanted.append(segment.slice(f"model/{segment.name}", segment.master))
            state: dict[str, Any] = dict(plain.get(segment.name, {}))
            for key in keys.get(segment.name, ()) if segment.master in group_of else ():
                full_name = f"optimizer/{segment.name}/{key}"
                info = reader.tensors[full_name]
                value = self._empty(segment, key, info.shape, info.dtype, group_of[segment.master])
                state[key] = value
                block = self._blocks.get(key, 0)
                if block or info.shape == segment.shape:
                    wanted.append(segment.slice(full_name, value, block))
                else:
                    wanted.append(TensorSlice(full_name, tuple(info.shape), value.view(-1)))
            states.append((segment, state))
        reader.read(wanted)
        for segment, state in states:
            self._optimizer.state.pop(segment.master, None)
            if state:
                self._optimizer.state[segment.master].update(state)
        return list(names)

    def _empty(
        self, segment: Segment, key: str, shape: Sequence[int], dtype: torch.dtype, group: dict[str, Any]
    ) -> torch.Tensor:
        """Return memory for one piece of state."""
        master = segment.master
        if block := self._blocks.get(key, 0):
            return torch.empty(segment.blocks(block), dtype=dtype, device=master.device)
        if segment.is_cut(key, shape):
            # Another run may have kept it in another format.
            return torch.empty(master.shape, dtype=self._format(key, master, dtype), device=master.device)
        return torch.empty(tuple(shape), dtype=dtype, device=device_of_state(key, group, master.device))

    def _format(self, key: str, master: torch.Tensor, saved: torch.dtype) -> torch.dtype:
        """Return the format of state that goes with the elements."""
        if not saved.is_floating_point:
            return saved
        if isinstance(self._optimizer, FlatOptimizer):
            return self._optimizer.format_of(key, master)
        return self._state_dtype or saved
