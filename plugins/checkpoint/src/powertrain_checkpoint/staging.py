"""An asynchronous save's copy of what lies in memory, laid out as the file will be."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

import attrs
import torch

from powertrain.roles.files import FileEngine, RandomFile, Transfer
from powertrain_checkpoint.image import Image, Part
from powertrain_checkpoint.means import PAGE, Means
from powertrain_checkpoint.memory import copy_checked, raw

_WRITE = 8 * 2**20
"""Bytes written at a time."""

_DEPTH = 4
"""Writes under way at once."""


@attrs.frozen(eq=False)
class _Run:
    """Bytes that follow one another in the file and in memory, from these offsets on."""

    offset: int
    start: int
    nbytes: int


@attrs.frozen(eq=False)
class _Copied:
    """A part in memory; ``checksum`` is None where it is found out later."""

    part: Part
    view: memoryview
    checksum: int | None


class Staging:
    """One block of host memory into which each asynchronous save copies what it writes.

    It grows to the largest save and is kept from then on, page-locked where
    the accelerator can, so a save allocates nothing.

    Args:
        means: threads and memory.
    """

    def __init__(self, means: Means) -> None:
        self._means = means
        self._block = memoryview(b"")

    def copy(self, parts: Iterable[Part]) -> Staged:
        """Copy parts, which are in the order of their file, and all lie in memory; valid until the next call."""
        parts = list(parts)
        runs, starts, total = _lay_out(parts)
        if total > len(self._block):
            self._block = memoryview(b"")  # it goes before its successor comes
            self._block = self._means.memory(total)
        views = [self._block[start : start + part.nbytes] for part, start in zip(parts, starts, strict=True)]
        sources = [raw(part.piece.tensor) for part in parts]
        self._means.synchronize([] if self._means.pins else sources)
        found: list[Future[int] | None] = []
        with self._means.crew() as crew:
            for source, view in zip(sources, views, strict=True):
                if source.device.type != "cpu" and self._means.pins:
                    # A stream carries it; its checksum is found when it is here, in the background.
                    torch.frombuffer(view, dtype=torch.uint8).copy_(source, non_blocking=True)
                    found.append(None)
                else:
                    found.append(crew.submit(copy_checked, source, [view]))
        self._means.synchronize(sources)
        checksums = [None if future is None else future.result() for future in found]
        copied = [_Copied(*each) for each in zip(parts, views, checksums, strict=True)]
        return Staged(self._means.engine, [(run, self._block[run.start :][: run.nbytes]) for run in runs], copied)

    def drop(self) -> None:
        """Give the memory up."""
        self._block = memoryview(b"")


def _lay_out(parts: Sequence[Part]) -> tuple[list[_Run], list[int], int]:
    """Return runs of parts without gaps, each part's place in memory, and how much memory that takes."""
    runs: list[_Run] = []
    starts: list[int] = []
    end = 0
    for part in parts:
        last = runs[-1] if runs else None
        if last is not None and last.offset + last.nbytes == part.offset:
            runs[-1] = attrs.evolve(last, nbytes=last.nbytes + part.nbytes)
        else:  # memory and file are alike modulo pages, so that whole pages can be written from where they are
            end = -(-(end - part.offset % PAGE) // PAGE) * PAGE + part.offset % PAGE
            runs.append(_Run(part.offset, end, part.nbytes))
        starts.append(end)
        end += part.nbytes
    return runs, starts, end


class Staged:
    """The content of a shard: what was copied, beside what is in the file already.

    Args:
        engine: opens the file.
        runs: what is written, and its bytes.
        copied: the same, part by part.
        written: entry and checksum of each part that is in the file already.
    """

    def __init__(
        self,
        engine: FileEngine,
        runs: Sequence[tuple[_Run, memoryview]],
        copied: Sequence[_Copied],
        written: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.engine = engine
        self._runs, self._copied = runs, copied
        self.written = list(written)

    def write(self, file: RandomFile, image: Image) -> tuple[tuple[int, ...], ...]:
        """Write what was copied; return the checksums of all entries.

        No memory is copied and no thread is started, so that training is left alone.

        Raises:
            TransferFailed: the disk refused.
        """
        found = list(self.written)
        unchecked = deque(self._copied)
        writing: deque[Transfer] = deque()
        for run, view in self._runs:
            for start in range(0, run.nbytes, _WRITE):
                if len(writing) == _DEPTH:
                    writing.popleft().wait()
                writing.append(file.write(run.offset + start, view[start : start + _WRITE]))
                if unchecked:
                    found.append(_checked(unchecked.popleft()))
        found += map(_checked, unchecked)
        while writing:
            writing.popleft().wait()
        return image.checksums(found)


def _checked(copied: _Copied) -> tuple[int, int]:
    checksum = zlib.crc32(copied.view) if copied.checksum is None else copied.checksum
    return copied.part.entry, checksum
