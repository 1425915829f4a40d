"""Writing a file's parts through a little memory: brought, copied and checked, written, all at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future, wait
from pathlib import Path

import attrs
import torch

from powertrain.roles.checkpoint import Loan, TensorSlice
from powertrain.roles.files import RandomFile, Transfer
from powertrain_checkpoint.image import Image, Part
from powertrain_checkpoint.means import PAGE, Means
from powertrain_checkpoint.memory import copy_checked, raw
from powertrain_checkpoint.shard import open_sized

WINDOW = 8 * 2**20
"""Bytes written at a time."""

AHEAD = 4
"""Parts that are on their way from where they rest while those before them are copied."""

_SMALL = 64 * 1024
"""Bytes that are copied here, rather than handed to another thread."""


class Streamed:
    """The content of a shard, written while who saves waits.

    Args:
        means: the file engine, memory and threads.
        pieces: the content of each entry, in memory or at rest.
    """

    def __init__(self, means: Means, pieces: Sequence[TensorSlice]) -> None:
        self.engine = means.engine
        self._means, self._pieces = means, pieces

    def write(self, file: RandomFile, image: Image) -> tuple[tuple[int, ...], ...]:
        """Write it all; return the checksums of each entry's blocks.

        Raises:
            StorageError: the disk refused, or what is at rest could not be brought.
        """
        return image.checksums(stream(file, image.parts(self._pieces), self._means))


def write_ahead(path: Path, image: Image, parts: Sequence[Part], means: Means) -> list[tuple[int, int]]:
    """Write some of a shard's parts into its file, which others will complete; return the checksums.

    Raises:
        StorageError: the disk refused, or what is at rest could not be brought.
    """
    if not parts:
        return []
    with open_sized(path, image.size, means.engine) as file:
        return stream(file, parts, means)


def stream(file: RandomFile, parts: Iterable[Part], means: Means) -> list[tuple[int, int]]:
    """Write parts, in order, at their places in a file; return the entry and the checksum of each.

    At most ``means.ring`` and ``AHEAD`` parts are in memory, wherever they rest. All transfers are over at the
    end, but nothing is forced to the disk.

    Raises:
        TransferFailed: the disk refused.
        StorageError: a part could not be brought.
    """
    with means.crew() as crew:
        writer = _Stream(file, means.ring(), crew)
        coming: deque[_Coming] = deque()
        try:
            for part in parts:
                coming.append(_Coming(part))
                if len(coming) > AHEAD:
                    writer.put(coming.popleft())
            while coming:
                writer.put(coming.popleft())
            return writer.finish()
        finally:
            writer.stop()
            for rest in coming:
                rest.release()


class _Coming:
    """A part on its way into memory."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._loan: Loan | None = part.piece.lend() if part.piece.slot is not None else None

    def wait(self) -> torch.Tensor:
        return raw(self.part.piece.tensor if self._loan is None else self._loan.wait())

    def release(self) -> None:
        loan, self._loan = self._loan, None
        if loan is not None:
            loan.release()


@attrs.frozen(eq=False)
class _Place:
    """Where a part's bytes, or some of them, are assembled: which window, where in the ring, where in the file."""

    window: int
    start: int
    stop: int
    offset: int


@attrs.frozen(eq=False)
class _Fill:
    """A part that is being copied."""

    coming: _Coming
    places: list[_Place]
    checksum: Future[int] | int


class _Stream:
    """A ring of windows: some are being filled, some written.

    Args:
        file: where to.
        ring: memory, a multiple of ``WINDOW``.
        crew: threads that copy.
    """

    def __init__(self, file: RandomFile, ring: memoryview, crew: Executor) -> None:
        self._file, self._ring, self._crew = file, ring, crew
        self._count = len(ring) // WINDOW
        self._end = 0  # bytes of the stream that have places
        self._offset = 0  # of the next byte in the file, if nothing is left out
        self._filling: deque[_Fill] = deque()
        self._open: _Place | None = None  # filled, not yet written
        self._writing: deque[tuple[int, Transfer]] = deque()
        self._checksums: list[tuple[int, int]] = []

    def put(self, coming: _Coming) -> None:
        """Take the next part."""
        part = coming.part
        try:
            places = self._places(part.offset, part.nbytes)
            self._make_room(places[-1].window - self._count)
            source = coming.wait()
        except BaseException:
            coming.release()
            raise
        views = [self._ring[place.start : place.stop] for place in places]
        if part.nbytes <= _SMALL:
            self._filling.append(_Fill(coming, places, copy_checked(source, views)))
        else:
            self._filling.append(_Fill(coming, places, self._crew.submit(copy_checked, source, views)))

    def finish(self) -> list[tuple[int, int]]:
        """Wait until all is written; return the checksums."""
        while self._filling:
            self._filled()
        self._write()
        while self._writing:
            self._writing.popleft()[1].wait()
        return self._checksums

    def stop(self) -> None:
        """After a failure: wait until nobody reads what is on loan."""
        while self._filling:
            fill = self._filling.popleft()
            if isinstance(fill.checksum, Future):
                wait([fill.checksum])
            fill.coming.release()

    def _places(self, offset: int, nbytes: int) -> list[_Place]:
        if offset != self._offset:  # something is left out: memory and file stay alike modulo pages
            self._end = -(-(self._end - offset % PAGE) // PAGE) * PAGE + offset % PAGE
        result = []
        stop = self._end + nbytes
        while self._end < stop:
            window, within = divmod(self._end, WINDOW)
            length = min(stop - self._end, WINDOW - within)
            start = window % self._count * WINDOW + within
            result.append(_Place(window, start, start + length, offset))
            self._end += length
            offset += length
        self._offset = offset
        return result

    def _make_room(self, last: int) -> None:
        """Wait until the windows up to ``last`` are written."""
        while self._filling and self._filling[0].places[0].window <= last:
            self._filled()
        if self._open is not None and self._open.window <= last:
            self._write()
        while self._writing and self._writing[0][0] <= last:
            self._writing.popleft()[1].wait()
        # What is filled already is written while more is copied.
        while self._filling and (isinstance(f := self._filling[0].checksum, int) or f.done()):
            self._filled()

    def _filled(self) -> None:
        """Wait until the oldest part is copied."""
        fill = self._filling[0]
        checksum = fill.checksum if isinstance(fill.checksum, int) else fill.checksum.result()
        self._filling.popleft()
        fill.coming.release()
        self._checksums.append((fill.coming.part.entry, checksum))
        for place in fill.places:
            last = self._open
            if last is not None and (last.window, last.stop) == (place.window, place.start) and _follows(last, place):
                self._open = attrs.evolve(last, stop=place.stop)
            else:
                self._write()
                self._open = place

    def _write(self) -> None:
        """Start to write what is filled."""
        place, self._open = self._open, None
        if place is not None:
            transfer = self._file.write(place.offset, self._ring[place.start : place.stop])
            self._writing.append((place.window, transfer))


def _follows(last: _Place, place: _Place) -> bool:
    return last.offset + (last.stop - last.start) == place.offset
