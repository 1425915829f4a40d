"""One logical file over one or more parts."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from powertrain.errors import PowertrainError, TransferFailed
from powertrain.roles.files import RandomFile, Transfer
from powertrain_offload.io.layout import part_sizes, whole_size
from powertrain_offload.io.moving import Move
from powertrain_offload.io.part import Part

if TYPE_CHECKING:
    from powertrain_offload.io.engine import Engine


class StripedFile(RandomFile):
    """The file of every engine; see ``powertrain.roles.files.RandomFile``.

    Attributes:
        size: in bytes, as it was opened or last resized.
        paths: of its parts.
        direct: whether whole blocks go past the page cache, in every part.
        why_buffered: why not; empty if they do.
    """

    def __init__(self, engine: Engine, parts: Sequence[Part], stripe: int) -> None:
        self._engine = engine
        self._parts = tuple(parts)
        self._stripe = stripe
        self._attached: Any = engine.attach(self._parts, stripe)
        self._lock = threading.Lock()
        self._moves: deque[Move] = deque()
        self._closed = False
        self.paths = tuple(part.path for part in parts)
        self.size = whole_size([part.size for part in parts], stripe)
        self.why_buffered = next((part.why_buffered for part in parts if part.why_buffered), "")
        self.direct = not self.why_buffered

    def read(self, offset: int, into: memoryview) -> Transfer:
        """Start to fill ``into`` with the bytes from ``offset`` on.

        Raises:
            ValueError: a negative offset, memory that is read-only or has gaps, or the file is closed.
        """
        if memoryview(into).readonly:
            raise ValueError("into: expected writable memory, found read-only memory")
        return self._start(False, offset, into)

    def write(self, offset: int, data: memoryview) -> Transfer:
        """Start to write ``data`` at ``offset``; past the end, the file grows.

        Raises:
            ValueError: a negative offset, memory that has gaps, or the file is closed.
        """
        return self._start(True, offset, data)

    def _start(self, writes: bool, offset: int, memory: memoryview) -> Transfer:
        engine = self._engine
        engine.check()
        memory = memoryview(memory)
        if not memory.c_contiguous:
            raise ValueError("expected memory without gaps, found a strided view")
        if offset < 0:
            raise ValueError(f"offset: expected 0 or more, found {offset}")
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.paths[0]} is closed")
            while self._moves and self._moves[0].settled():
                self._moves.popleft()
            moving = engine.start(self._attached, writes, offset, memory)
            move = Move(moving, engine.owner, self.paths, writes, offset, memory.nbytes)
            self._moves.append(move)
        return move

    def settle(self) -> TransferFailed | None:
        """Wait for all transfers; return the first error that nobody has got."""
        first: TransferFailed | None = None
        while True:
            with self._lock:
                if not self._moves:
                    return first
                move = self._moves[0]
            if not move.told:
                try:
                    move.wait()
                except TransferFailed as error:
                    first = first or error
            with self._lock:
                if self._moves and self._moves[0] is move:
                    self._moves.popleft()

    def resize(self, size: int) -> None:
        """Wait for all transfers, then make the file ``size`` bytes long.

        Raises:
            StorageFull: the disk has less; the file is as it was.
            TransferFailed: a transfer before had failed, and nobody has heard.
        """
        if size < 0:
            raise ValueError(f"size: expected 0 or more, found {size}")
        self._settle()
        before = [part.size for part in self._parts]
        try:
            for part, wanted in zip(self._parts, part_sizes(size, len(self._parts), self._stripe), strict=True):
                if part.size != wanted:
                    part.resize(wanted)
        except PowertrainError:
            for part, old in zip(self._parts, before, strict=True):
                if part.size > old:
                    part.resize(old)
            raise
        self.size = size

    def sync(self) -> None:
        """Wait for all transfers, then force what was written to the disk.

        Raises:
            TransferFailed: the disk refused, or a transfer had failed and nobody has heard.
        """
        self._settle()
        for part in self._parts:
            try:
                part.sync()
            except OSError as error:
                if error.errno == errno.EINVAL:
                    continue  # a device that keeps nothing
                raise TransferFailed(
                    f"forcing {part.path} to the disk failed: {error.strerror}",
                    where=part.path,
                    expected="every byte that was written, on the disk",
                    found=errno.errorcode.get(error.errno or 0),
                ) from error

    def _settle(self) -> None:
        self._engine.owner.check()
        if self._closed:
            raise ValueError(f"{self.paths[0]} is closed")
        if (error := self.settle()) is not None:
            raise error

    def close(self) -> None:
        """Wait for all transfers and close; a second call does nothing. Errors that nobody got are logged."""
        if self._closed:
            return
        if self._engine.owner.here():
            error = self.settle()
            if error is not None:
                self._engine.log.warning("a transfer failed and nobody waited for it: %s", error)
        self._closed = True
        self._engine.forget(self)
        for part in self._parts:
            part.close()

    def __enter__(self) -> StripedFile:
        return self

    def __del__(self, _warn: Any = warnings.warn, _getpid: Any = os.getpid) -> None:
        if not getattr(self, "_closed", True):
            if _getpid() == self._engine.owner.process:
                _warn(f"{self.paths[0]} was not closed", ResourceWarning, stacklevel=2, source=self)
            self.close()
