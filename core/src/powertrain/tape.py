"""A construction that was recorded, and its replay: any tensor of it, alone, with the bits of the original.

Content belongs to storages. A view is no operation, only another way to look at a
storage, so the tape holds the operations that write; each names what it touches by
``Ref``. To make a storage, the operations that its content depends on are found by
walking back, and run on the CPU in the recorded order.

Random numbers: each operation that draws them says after which one of the others it
drew. Their generator's states are found when they are needed first, in order, on
scratch memory of one tensor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from powertrain.compat import version
from powertrain.errors import BirthError

_ATTRIBUTE = "powertrain_entry"
_CPU = torch.device("cpu")
_COPIED = 64 * 2**10
"""Bytes up to which a real tensor is copied into the tape; a larger one must not change."""


@attrs.frozen
class Ref:
    """A tensor of the construction: a storage, and how it is looked at."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugate: bool = False

    def covers(self, nbytes: int) -> bool:
        """Return whether it shows every byte of a storage of this size, each once."""
        numel = 1
        for size, stride in sorted(zip(self.size, self.stride, strict=True), key=lambda pair: pair[1]):
            if size != 1 and stride != numel:
                return False
            numel *= size
        return numel * self.dtype.itemsize == nbytes and not self.conjugate


@attrs.frozen(eq=False)
class Constant:
    """A real tensor that an operation of the construction read."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def keep(cls, tensor: torch.Tensor) -> Constant:
        """Keep a small tensor's values, or a large one itself."""
        if tensor.numel() * tensor.element_size() <= _COPIED:
            tensor = tensor.detach().clone()
        return cls(tensor, version(tensor))

    @property
    def copied(self) -> bool:
        """Whether the tape owns it."""
        return self.tensor.numel() * self.tensor.element_size() <= _COPIED

    def value(self) -> torch.Tensor:
        """Return the tensor.

        Raises:
            BirthError: it was changed after it was read.
        """
        if not self.copied and version(self.tensor) != self.version:
            raise BirthError(
                "a tensor that the deferred construction read was changed before the parameters were made",
                found=f"a tensor of shape {list(self.tensor.shape)}",
                remedy="copy it before the construction, or leave it as it is until powertrain.initialize returns",
            )
        return self.tensor


@attrs.frozen(eq=False)
class Draw:
    """How an operation draws random numbers.

    Attributes:
        source: the record after which the generator is where this one found it (-1: as on entering
            the block), or the generator's state.
        pure: how much it draws depends on no values, so scratch memory may stand in for its arguments.
        keyword: it takes ``generator=``; otherwise the default generator is lent to it.
    """

    source: int | torch.Tensor
    pure: bool
    keyword: bool


@attrs.frozen(eq=False)
class Record:
    """One operation.

    Attributes:
        function: what to call.
        args: its arguments, with a Ref or Constant in place of each tensor.
        kwargs: the same of the named ones.
        outputs: where its outputs go, in their order; None where one lives in a storage that it was given.
        reads: the storages that it depends on.
        writes: the storages that it changes, or makes.
        covered: the storage of which it overwrites everything.
        draw: how it draws random numbers; None if it draws none.
        dtype: the default type at the time.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref | None, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    covered: int | None
    draw: Draw | None
    dtype: torch.dtype


class Tape:
    """The operations of one ``deferred()`` block.

    Attributes:
        entry: the state of the default generator on entering.
        records: the operations.
    """

    def __init__(self, entry: torch.Tensor) -> None:
        self.entry = entry
        self.records: list[Record] = []
        self._nbytes: list[int] = []
        self._writers: list[list[int]] = []
        self._draws: list[int] = []
        self._after: dict[int, torch.Tensor] = {}
        self._known = 0  # how many of the draws have their state after

    # --- recording ---------------------------------------------------------------------

    def add_storage(self, storage: torch.UntypedStorage, device: torch.device) -> Entry:
        """Begin to follow a storage."""
        entry = Entry(self, len(self._nbytes), device)
        self._nbytes.append(storage.nbytes())
        self._writers.append([])
        setattr(storage, _ATTRIBUTE, entry)
        return entry

    def grow(self, index: int, nbytes: int) -> None:
        """Take note of a storage's size."""
        self._nbytes[index] = max(nbytes, self._nbytes[index])

    def nbytes(self, index: int) -> int:
        """Return the size of a storage in bytes."""
        return self._nbytes[index]

    def add(self, record: Record) -> int:
        """Append an operation; return its index."""
        index = len(self.records)
        self.records.append(record)
        for storage in record.writes:
            self._writers[storage].append(index)
        if record.draw is not None:
            self._draws.append(index)
        return index

    # --- what the data ranks agree on ------------------------------------------------------

    def facts(self) -> list[torch.Tensor]:
        """Return the tensors that must be the same on every rank for it to make the same parameters.

        They are generator states and small constants; large ones are the caller's.
        """
        found = [self.entry]
        for record in self.records:
            if record.draw is not None and isinstance(record.draw.source, torch.Tensor):
                found.append(record.draw.source)
            found += [leaf.tensor for leaf in _leaves((record.args, record.kwargs)) if _is_owned(leaf)]
        return found

    def forget(self) -> None:
        """Find the generator's states anew: ``facts`` has changed."""
        self._after.clear()
        self._known = 0

    # --- replay -------------------------------------------------------------------------------

    @torch.no_grad()
    def make(self, ref: Ref, before: int | None = None) -> torch.Tensor:
        """Return a new CPU tensor with the value that ``ref`` had before a record (None: in the end)."""
        chain = self._chain(ref.storage, len(self.records) if before is None else before)
        last = {s: i for i in chain for s in self.records[i].reads | self.records[i].writes}
        storages: dict[int, torch.UntypedStorage] = {}
        for index in chain:
            self._run(index, storages)
            record = self.records[index]
            for storage in record.reads | record.writes:
                if last[storage] == index and storage != ref.storage:
                    storages.pop(storage, None)
        return self._view(ref, storages)

    def _chain(self, storage: int, before: int) -> list[int]:
        """Return the records that a storage's content depends on, in order."""
        chosen: set[int] = set()
        pending = [(storage, before)]
        while pending:
            wanted, bound = pending.pop()
            writers = self._writers[wanted]
            for index in reversed(writers[: bisect_left(writers, bound)]):
                if index not in chosen:
                    chosen.add(index)
                    pending += [(read, index) for read in self.records[index].reads]
                if self.records[index].covered == wanted:
                    break
        return sorted(chosen)

    def _run(self, index: int, storages: dict[int, torch.UntypedStorage]) -> None:
        record = self.records[index]
        if record.draw is None:
            outputs = self._call(record, lambda ref: self._view(ref, storages))
        else:
            with self._drawing(index) as extra:
                outputs = self._call(record, lambda ref: self._view(ref, storages), extra)
        for ref, tensor in zip(record.outputs, outputs, strict=True):
            if ref is not None:
                self._adopt(ref, tensor, storages)

    def _call(
        self, record: Record, view: Callable[[Ref], torch.Tensor], extra: dict[str, Any] | None = None
    ) -> list[torch.Tensor]:
        args, kwargs = _resolve((record.args, record.kwargs), view)
        default = torch.get_default_dtype()
        if default == record.dtype:
            result = record.function(*args, **kwargs, **(extra or {}))
        else:
            torch.set_default_dtype(record.dtype)
            try:
                result = record.function(*args, **kwargs, **(extra or {}))
            finally:
                torch.set_default_dtype(default)
        return [leaf for leaf in _leaves(result) if isinstance(leaf, torch.Tensor)]

    def _view(self, ref: Ref, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
        if ref.storage not in storages:
            nbytes = self._nbytes[ref.storage]
            storages[ref.storage] = torch.empty(nbytes, dtype=torch.uint8, device=_CPU).untyped_storage()
        result = torch.empty(0, dtype=ref.dtype, device=_CPU)
        result.set_(storages[ref.storage], ref.offset, ref.size, ref.stride)
        return result.conj() if ref.conjugate else result

    def _adopt(self, ref: Ref, tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> None:
        """Take over an output's memory if it lies as the recorded one did, or copy it to where it should."""
        storage = tensor.untyped_storage()
        same = (tuple(tensor.stride()), tensor.storage_offset()) == (ref.stride, ref.offset)
        if same and storage.nbytes() == self._nbytes[ref.storage] and tensor.is_conj() == ref.conjugate:
            storages[ref.storage] = storage
        else:
            self._view(ref, storages).copy_(tensor)

    # --- random numbers --------------------------------------------------------------------------

    @contextmanager
    def _drawing(self, index: int) -> Iterator[dict[str, Any]]:
        """Give the operation inside the generator state that it found; keep the one that it leaves."""
        draw = self.records[index].draw
        assert draw is not None
        before = self._before(draw)
        if draw.keyword:
            generator = torch.Generator()
            generator.set_state(before)
            yield {"generator": generator}
            after = generator.get_state()
        else:
            saved = torch.get_rng_state()
            torch.set_rng_state(before)
            try:
                yield {}
                after = torch.get_rng_state()
            finally:
                torch.set_rng_state(saved)
        self._after.setdefault(index, after)

    def _before(self, draw: Draw) -> torch.Tensor:
        return draw.source if isinstance(draw.source, torch.Tensor) else self.state_after(draw.source)

    def state_after(self, index: int) -> torch.Tensor:
        """Return the generator's state after a record that draws; -1 is the entry of the block."""
        if index < 0:
            return self.entry
        scratch = _Scratch()
        while index not in self._after:
            self._advance(self._draws[self._known], scratch)
            self._known += 1
        return self._after[index]

    @torch.no_grad()
    def _advance(self, index: int, scratch: _Scratch) -> None:
        """Find the state after a record, all those before it being known."""
        record = self.records[index]
        if index in self._after or record.draw is None:
            return
        view = scratch if record.draw.pure else lambda ref: self.make(ref, index)
        with self._drawing(index) as extra:
            self._call(record, view, extra)


@attrs.frozen(eq=False)
class Entry:
    """What a storage of the construction carries.

    Attributes:
        tape: where its content is recorded.
        index: its number there.
        device: where it would rest had the construction not been deferred.
    """

    tape: Tape
    index: int
    device: torch.device

    def ref(self, tensor: torch.Tensor) -> Ref:
        """Return the reference of a tensor in this storage.

        Raises:
            BirthError: a kind of view that no reference can hold.
        """
        if tensor.is_neg():
            raise BirthError(
                "the imaginary part of a conjugate cannot be deferred", remedy="resolve it first: x.resolve_neg()"
            )
        return Ref(
            self.index,
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
            tensor.is_conj(),
        )

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the value of a tensor in this storage, on the CPU."""
        return self.tape.make(self.ref(tensor))


def entry_of(tensor: torch.Tensor) -> Entry | None:
    """Return what is recorded of a tensor, or None for a real one and for a meta tensor made otherwise."""
    if tensor.layout != torch.strided:
        return None
    found: Entry | None = getattr(tensor.untyped_storage(), _ATTRIBUTE, None)
    return found


class _Scratch:
    """Memory for numbers that nobody wants, one piece for all.

    Allocated for each, they would take the memory of the whole model: the states that are kept in between lie down in
    the gaps that they leave, and the next one fits into none.
    """

    def __init__(self) -> None:
        self._storage = torch.empty(0, dtype=torch.uint8, device=_CPU).untyped_storage()

    def __call__(self, ref: Ref) -> torch.Tensor:
        """Return a tensor like the one that ``ref`` stands for, with arbitrary content."""
        reach = 1 + sum((size - 1) * stride for size, stride in zip(ref.size, ref.stride, strict=True))
        nbytes = (reach if 0 not in ref.size else 0) * ref.dtype.itemsize
        if nbytes > self._storage.nbytes():
            self._storage = torch.empty(nbytes, dtype=torch.uint8, device=_CPU).untyped_storage()
        return torch.empty(0, dtype=ref.dtype, device=_CPU).set_(self._storage, 0, ref.size, ref.stride)


def _is_owned(leaf: Any) -> bool:
    return isinstance(leaf, Constant) and leaf.copied


def _resolve(nest: Any, view: Callable[[Ref], torch.Tensor]) -> Any:
    """Put real tensors in the place of references and constants."""
    if isinstance(nest, Ref):
        return view(nest)
    if isinstance(nest, Constant):
        return nest.value()
    if isinstance(nest, (tuple, list)):
        return type(nest)([_resolve(item, view) for item in nest])
    if isinstance(nest, dict):
        return {key: _resolve(item, view) for key, item in nest.items()}
    return nest


def _leaves(nest: Any) -> Iterator[Any]:
    items: Sequence[Any] = list(nest.values()) if isinstance(nest, dict) else nest
    if isinstance(nest, (tuple, list, dict)):
        for item in items:
            yield from _leaves(item)
    else:
        yield nest
