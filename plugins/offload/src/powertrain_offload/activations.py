"""What backward needs of forward, kept in a tier in between.

Autograd hands each tensor that it saves to ``OffloadedActivations``, which moves its memory into a slot and hands
it back when backward asks. Backward asks in the reverse order, so it brings the next ones ahead. Views of one memory
move once. Under checkpointing only what goes into blocks is saved, and moves.

A tensor is moved as it is when it is saved. Who writes into it afterwards does not change what backward sees, as
with ``torch.autograd.graph.save_on_cpu``. Tensors that stay are checked for such writes as without hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from powertrain import nest
from powertrain.compat import in_backward, plain_dispatch, version
from powertrain.forward import detour
from powertrain.roles.communicator import Handle
from powertrain.roles.tier import Lease, Slot, Tier
from powertrain_offload.reuse import Slots

LEAST = 2**20
PREFETCH = 2
ALIGN = 64
"""Bytes: where a piece of a larger memory starts, so that any type of element can lie in it."""


def offload_activations(
    model: torch.nn.Module, tier: Tier, *, least: int = LEAST, prefetch: int = PREFETCH
) -> OffloadedActivations:
    """Let what autograd saves in a model's forward passes rest in a tier, until ``close`` is called on the result.

    The model stays what it is. Its parameters, its buffers and what it is called with stay where they are, gathered
    parameters too: others hold them anyway.

    Args:
        model: any module.
        tier: where tensors rest.
        least: bytes; smaller ones stay.
        prefetch: how many are brought ahead in backward.
    """
    passes = Passes(model)
    activations = OffloadedActivations(tier, least=least, prefetch=prefetch, keep=passes.keeps)
    if not tier.stays:
        passes.activations = activations
        activations.on_close(detour(model, passes))
    return activations


class Passes:
    """Runs the forward passes of a model with its saved tensors on their way to a tier.

    Args:
        model: whose.

    Attributes:
        activations: moves them.
    """

    activations: OffloadedActivations

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._staying: set[int] = set()
        self._running = False

    # What hooks do is no work for a compiler; what it compiles is within.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what ``forward`` returns."""
        # What is run again in backward saves its tensors for whoever runs it again.
        if self._running or not torch.is_grad_enabled() or in_backward():
            return forward(*args, **kwargs)
        self._running = True
        try:
            self._staying.update(_storages(self._model, (args, kwargs)))
            with self.activations.saving():
                return forward(*args, **kwargs)
        finally:
            self._staying.clear()
            self._running = False

    def keeps(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies in memory that others hold."""
        return id(tensor.untyped_storage()) in self._staying

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model is no part of the run: it saves as any module does

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _storages(model: torch.nn.Module, inputs: Any) -> Iterator[int]:
    """Yield what tells the memory of a model's tensors and inputs apart; it stays so while they live."""
    with plain_dispatch():  # a parameter that is not gathered is asked for no elements
        for tensor in (*model.parameters(), *model.buffers(), *nest.tensors(inputs)):
            if tensor.layout == torch.strided and not tensor.is_meta:
                yield id(tensor.untyped_storage())


class OffloadedActivations:
    """Moves tensors that autograd saves into a tier, and back.

    Args:
        tier: where they rest.
        least: bytes; smaller ones stay.
        prefetch: how many are brought ahead in backward.
        keep: whether a tensor has to stay.
    """

    def __init__(self, tier: Tier, *, least: int, prefetch: int, keep: Callable[[torch.Tensor], bool]) -> None:
        self._device = tier.device
        self._slots = Slots(tier, "activations")
        self._least, self._prefetch, self._keep = least, prefetch, keep
        self._memories: weakref.WeakKeyDictionary[torch.UntypedStorage, list[weakref.ref[Piece]]] = (
            weakref.WeakKeyDictionary()
        )
        self._order: list[weakref.ref[Piece]] = []
        self._closing: list[Callable[[], None]] = []

    @property
    def resting(self) -> int:
        """Bytes in the tier that backward has not done with."""
        return self._slots.taken

    @property
    def reserved(self) -> int:
        """Bytes of the tier that are set aside."""
        return self._slots.reserved

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Move what is saved within the block: one forward pass."""
        self._slots.begin()
        self._order = []
        with saved_tensors_hooks(self.pack, self.unpack):
            yield

    def on_close(self, action: Callable[[], None]) -> None:
        """Let ``close`` call ``action``."""
        self._closing.append(action)

    def close(self) -> None:
        """Move nothing any more; free what no graph needs. What a graph does need is freed with it."""
        while self._closing:
            self._closing.pop()()
        self._slots.close()

    # --- hooks ---------------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> Left | Saved:
        """Take a tensor that autograd saves."""
        low, high = _span(tensor)
        if high - low < self._least or not self._movable(tensor) or self._keep(tensor):
            return Left(tensor)
        with torch.no_grad():
            piece = self._found(tensor, low, high) or self._moved(tensor, low, high)
        if not self._order or self._order[-1]() is not piece:
            self._order.append(weakref.ref(piece))
        return Saved(piece, tensor, self._order)

    def unpack(self, saved: Left | Saved) -> torch.Tensor:
        """Give it back.

        Raises:
            RuntimeError: it stayed, and was written into.
            StorageError: it could not be brought back.
        """
        if isinstance(saved, Left):
            return saved.tensor()
        with torch.no_grad():
            saved.piece.start()
            self._bring_ahead(saved)
            return saved.tensor()

    def _movable(self, tensor: torch.Tensor) -> bool:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        flags = tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
        return plain and tensor.device == self._device and not flags

    def _found(self, tensor: torch.Tensor, low: int, high: int) -> Piece | None:
        """Return a piece that holds these bytes of the tensor's memory as they are now."""
        for reference in self._memories.get(tensor.untyped_storage(), ()):
            piece = reference()
            if piece is not None and piece.holds(version(tensor), low, high):
                return piece
        return None

    def _moved(self, tensor: torch.Tensor, low: int, high: int) -> Piece:
        """Move the tensor's bytes, or all of its memory if that is not much more: other views of it may follow."""
        storage = tensor.untyped_storage()
        if 2 * (high - low) >= storage.nbytes():
            low, high = 0, storage.nbytes()
        low -= low % ALIGN
        slot = self._slots.take(high - low)
        lease = slot.blank(0, high - low)
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, low, (high - low,), (1,))
        lease.wait().copy_(source)
        piece = Piece(self._slots, slot, low, high, version(tensor), lease.store())
        known = [reference for reference in self._memories.get(storage, ()) if reference() is not None]
        self._memories[storage] = [*known, weakref.ref(piece)]
        return piece

    def _bring_ahead(self, saved: Saved) -> None:
        """Start to bring what was saved before, up to ``prefetch`` pieces."""
        ahead: list[Piece] = []
        for place in range(saved.place - 1, -1, -1):
            if len(ahead) >= self._prefetch:
                break
            piece = saved.order[place]()
            if piece is None or piece is saved.piece or piece in ahead:
                continue
            piece.start()
            ahead.append(piece)


class Piece:
    """Bytes of one memory, at rest.

    Args:
        slots: where the slot goes when nobody needs the piece any more.
        slot: holds it.
        low: the first of its bytes, counted in the memory.
        high: the byte after its last.
        version: of the memory when it was copied.
        stored: tells when it rests.
    """

    def __init__(self, slots: Slots, slot: Slot, low: int, high: int, version: int, stored: Handle) -> None:
        self.low, self.high = low, high
        self.users: weakref.WeakSet[Saved] = weakref.WeakSet()
        self._slots, self._slot, self._stored = slots, slot, stored
        self._version = version
        self._lease: Lease | None = None
        self._here: torch.Tensor | None = None
        self._waiting: weakref.WeakSet[Saved] = weakref.WeakSet()

    def holds(self, version: int, low: int, high: int) -> bool:
        """Return whether these bytes, at this version, are among it."""
        return version == self._version and self.low <= low and high <= self.high

    def start(self) -> None:
        """Start to bring it here."""
        if self._here is None and self._lease is None:
            self._lease = self._slot.fetch(0, self.high - self.low)

    def content(self, user: Saved) -> torch.Tensor:
        """Return its bytes, which stay here until each of those who need them now has asked once."""
        if self._here is None:
            self.start()
            assert self._lease is not None
            lease, self._lease = self._lease, None
            # A copy, as nobody tells when autograd is through with what it is given, and the lease has to end.
            self._here = lease.wait().clone()
            lease.release()
            self._waiting = weakref.WeakSet(self.users)
        here = self._here
        self._waiting.discard(user)
        if not self._waiting:
            self._here = None
        return here

    def __del__(self) -> None:
        # It may die in any thread, and in the midst of anything.
        self._slots.put_back(self._slot, self._stored, self._lease)


class Saved:
    """A tensor that was moved.

    Args:
        piece: holds its elements.
        tensor: what it was.
        order: of the pieces of its forward pass, up to its own so far.
    """

    def __init__(self, piece: Piece, tensor: torch.Tensor, order: list[weakref.ref[Piece]]) -> None:
        self.piece, self.order, self.place = piece, order, len(order) - 1
        self._dtype, self._size, self._stride = tensor.dtype, tensor.size(), tensor.stride()
        self._offset = (tensor.storage_offset() * tensor.element_size() - piece.low) // tensor.element_size()
        piece.users.add(self)

    def tensor(self) -> torch.Tensor:
        """Return a tensor that is as it was."""
        content = self.piece.content(self)
        empty = torch.empty(0, dtype=self._dtype, device=content.device)
        return empty.set_(content.untyped_storage(), self._offset, self._size, self._stride)


class Left:
    """A tensor that stays where it is.

    Args:
        tensor: as autograd saves it.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()  # with its history it would hold itself
        self._version = version(tensor)

    def tensor(self) -> torch.Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: it was written into.
        """
        if version(self._tensor) != self._version:  # autograd leaves this to the hooks
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {list(self._tensor.shape)} is at version {version(self._tensor)}; expected version "
                f"{self._version} instead"
            )
        return self._tensor


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its memory, and the one after its last."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return 0, 0
    size = tensor.element_size()
    first = tensor.storage_offset()
    last = first + sum((n - 1) * stride for n, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return int(first * size), int((last + 1) * size)
