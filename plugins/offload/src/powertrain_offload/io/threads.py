"""The engine in Python: threads that read and write through the page cache, on any system."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Sequence

import attrs

from powertrain_offload.io.crew import Crew
from powertrain_offload.io.engine import Engine
from powertrain_offload.io.failures import Failure
from powertrain_offload.io.layout import span
from powertrain_offload.io.moving import Moving
from powertrain_offload.io.part import Part
from powertrain_offload.io.settings import Settings


@attrs.frozen
class Attached:
    """A file.

    Attributes:
        parts: of it.
        stripe: bytes of one part before the next one's turn.
        seeking: for systems on which a descriptor has one position for all.
    """

    parts: Sequence[Part]
    stripe: int
    seeking: threading.Lock = attrs.field(factory=threading.Lock)


class ThreadsEngine(Engine):
    """Moves blocks by Python's threads, which wait without its lock."""

    name = "threads"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._crew = Crew(settings.threads)
        self._end = weakref.finalize(self, self._crew.stop)  # at the end of the process too

    def attach(self, parts: Sequence[Part], stripe: int) -> Attached:
        """Return the file as the threads know it."""
        return Attached(parts, stripe)

    def start(self, attached: Attached, writes: bool, offset: int, view: memoryview) -> Moving:
        """Start to move the bytes of ``view``."""
        moving = Blocks(self._crew, attached, writes, offset, view, self.settings.block)
        # Each of these goes on until no block is left, so an earlier transfer comes first.
        for _ in range(min(self.settings.threads, moving.blocks)):
            self._crew.submit(moving.run)
        return moving

    def _stop(self) -> None:
        self._end()


class Blocks:
    """One transfer, of which threads take a block each until there is none left."""

    def __init__(self, crew: Crew, file: Attached, writes: bool, offset: int, view: memoryview, block: int) -> None:
        self._crew = crew
        self._file = file
        self._writes = writes
        self._offset = offset
        self._block = block
        self._length = view.nbytes
        self._view: memoryview | None = view.cast("B") if view.nbytes else view
        self._lock = threading.Lock()
        self._given = 0
        self._left = self._length
        self._failure: Failure | None = None
        self._over = threading.Event()
        self.blocks = -(-self._length // block)
        if not self._length:
            self._end()

    def wait(self) -> None:
        """Return when it is over."""
        self._over.wait()

    def done(self) -> bool:
        """Return whether it is over."""
        return self._over.is_set()

    def failure(self) -> Failure | None:
        """Return what failed."""
        return self._failure

    def run(self) -> None:
        """Move blocks until all are given out."""
        while True:
            with self._lock:
                view = self._view
                if self._crew.over() and self._failure is None and self._given < self._length:
                    self._failure = self._abandoned()
                if self._failure is not None:  # the rest is not tried
                    self._left -= self._length - self._given
                    self._given = self._length
                start, length = self._given, 0
                if view is not None and start < self._length:
                    most = min(self._block, self._length - start)
                    part, offset, length = span(self._offset + start, most, len(self._file.parts), self._file.stripe)
                    self._given += length
            if not length or view is None:
                break
            failure = self._move(view[start : start + length], start, part, offset)
            with self._lock:
                self._left -= length
                if failure is not None and (self._failure is None or failure.position < self._failure.position):
                    self._failure = failure
        if not self._left:
            self._end()

    def _abandoned(self) -> Failure:
        part, offset, _ = span(self._offset + self._given, 1, len(self._file.parts), self._file.stripe)
        return Failure(errno.ECANCELED, self._given, part, offset)

    def _end(self) -> None:
        self._view = None  # others may have the memory
        self._over.set()

    def _move(self, view: memoryview, start: int, part: int, offset: int) -> Failure | None:
        moved = 0
        while moved < len(view):
            try:
                count = self._call(self._file.parts[part].buffered, view[moved:], offset + moved)
            except InterruptedError:
                continue
            except OSError as error:
                return Failure(error.errno or errno.EIO, start + moved, part, offset + moved)
            if not count:
                return Failure(errno.EIO if self._writes else 0, start + moved, part, offset + moved)
            moved += count
        return None

    def _call(self, descriptor: int, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.pwrite(descriptor, view, offset) if self._writes else os.preadv(descriptor, [view], offset)
        with self._file.seeking:
            os.lseek(descriptor, offset, os.SEEK_SET)
            if self._writes:
                return os.write(descriptor, view)
            data = os.read(descriptor, len(view))
            view[: len(data)] = data
            return len(data)
