"""What a rank holds of single parameters, for those who look at them and write into them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from sys import getrefcount

import attrs
import torch

from powertrain.compat import owns_its_memory
from powertrain.roles.checkpoint import TensorSlice
from powertrain_zero.chunk import Chunk, Segment
from powertrain_zero.flat import Flat
from powertrain_zero.gradients import FlatGradients
from powertrain_zero.update import Updater


@attrs.frozen(eq=False)
class _Shown:
    """A copy, in one piece, of what rests in several or elsewhere.

    Attributes:
        slice: what was handed out.
        pieces: what it was copied from, in order.
        checksum: of the copy as it was then: those who fill tensors may write past torch, which counts writes.
    """

    slice: TensorSlice
    pieces: Sequence[TensorSlice]
    checksum: int

    def is_ours_alone(self) -> bool:
        """Return whether nobody else can write into the copy any more."""
        # One reference is the attribute that holds the object, one that of the call.
        held = getrefcount(self.slice) > 2 or getrefcount(self.slice.tensor) > 2
        return not held and owns_its_memory(self.slice.tensor)

    def write_back(self) -> None:
        """Bring home what was written into the copy, if anything was."""
        if _checksum(self.slice.tensor) == self.checksum:
            return
        taken = 0
        for piece in self.pieces:
            loan = piece.lend(blank=True)
            part = self.slice.tensor[taken : taken + piece.tensor.numel()]
            loan.wait().copy_(part)
            loan.store()
            taken += piece.tensor.numel()


class Parts:
    """Shows this rank's slices of parameters, their gradients and their optimizer state.

    What rests elsewhere is shown as a copy: ``write_back`` brings home what was written into it.

    Args:
        optimizer: whose state is shown.
        updater: knows what rests where.
        blocks: keys of state with one element for so many of the parameter's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, updater: Updater, blocks: Mapping[str, int]) -> None:
        self._optimizer = optimizer
        self._updater = updater
        self._blocks = dict(blocks)
        self._shown: dict[tuple[str, str], _Shown] = {}

    def of(self, flat: Flat, index: int, gradients: FlatGradients | None) -> dict[str, TensorSlice]:
        """Return the slices of one parameter.

        Args:
            flat: which holds it.
            index: its place there.
            gradients: of the flat, if there is one of the parameter.
        """
        self._let_go()
        name, shape = flat.named[index][0], tuple(flat.layout.entries[index].shape)
        held = [(chunk, segment) for chunk in flat.chunks for segment in chunk.segments if segment.index == index]
        if not held:
            result = {"value": TensorSlice(name, shape, torch.empty(0, dtype=flat.master_dtype))}
            if gradients is not None:
                result["grad"] = TensorSlice(name, shape, torch.empty(0, dtype=gradients.dtype))
            return result
        result = {"value": self._whole(name, "value", [chunk.slice(name, segment) for chunk, segment in held])}
        if gradients is not None:
            result["grad"] = self._gradient(flat, index, gradients, held[0][1])
        state: dict[str, list[TensorSlice]] = {}
        for chunk, segment in held:
            for key, piece in self._state(name, chunk, segment):
                state.setdefault(key, []).append(piece)
        for key, pieces in state.items():
            # What does not go with the elements (a step count) each piece has for itself, all alike.
            cut = (
                sum(piece.tensor.numel() for piece in pieces[1:]) and pieces[0].shape == shape
            ) or key in self._blocks
            result[f"optimizer/{key}"] = self._whole(name, key, pieces if cut else pieces[:1])
        return result

    def write_back(self) -> None:
        """Bring home what was written into copies."""
        for shown in self._shown.values():
            shown.write_back()

    def _let_go(self) -> None:
        """Bring home, and drop, copies that nobody else holds: who goes through a whole model has one at a time."""
        for key in [key for key, shown in self._shown.items() if shown.is_ours_alone()]:
            self._shown.pop(key).write_back()

    def forget(self) -> None:
        """Let go of the copies: what they show is about to change."""
        self._shown.clear()

    def _state(self, name: str, chunk: Chunk, segment: Segment) -> Iterator[tuple[str, TensorSlice]]:
        for key, value in self._optimizer.state.get(segment.master, {}).items():
            if isinstance(value, torch.Tensor):
                yield key, segment.slice(name, value, self._blocks.get(key, 0))
        travel = self._updater.travels.get(chunk)
        if travel is not None and travel.kept is not None:
            yield from travel.kept.slices_of(segment, name, self._blocks)

    def _whole(self, name: str, key: str, pieces: Sequence[TensorSlice]) -> TensorSlice:
        """Return pieces that follow one another as one."""
        first = pieces[0]
        if len(pieces) == 1 and first.slot is None:
            return first
        if (name, key) not in self._shown:
            copies = []
            for piece in pieces:
                loan = piece.lend()
                copies.append(loan.wait().clone())
                loan.release()
            whole = attrs.evolve(first, tensor=torch.cat(copies), slot=None, first=0)
            self._shown[name, key] = _Shown(whole, list(pieces), _checksum(whole.tensor))
        return self._shown[name, key].slice

    def _gradient(self, flat: Flat, index: int, gradients: FlatGradients, first: Segment) -> TensorSlice:
        """Return the mean gradient as the last update used it."""
        gradients.settle()
        start, stop = next((start, stop) for number, start, stop in flat.overlaps if number == index)
        name, shape = flat.named[index][0], tuple(flat.layout.entries[index].shape)
        if gradients.shard is not None:
            self._updater.show()
            return TensorSlice(name, shape, gradients.shard[start:stop], first.start)
        if (name, "grad") not in self._shown:
            lease = gradients.fetch(start, stop, torch.device("cpu"))
            copy = lease.wait().view(gradients.dtype) * self._updater.scale
            lease.release()
            self._shown[name, "grad"] = _Shown(TensorSlice(name, shape, copy, first.start), (), _checksum(copy))
        return self._shown[name, "grad"].slice


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.view(torch.uint8).cpu().numpy().data)
