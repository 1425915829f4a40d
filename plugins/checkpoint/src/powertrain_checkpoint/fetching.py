"""Bringing ranges of files: read ahead, checked by threads, and kept in memory where there is room."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from zlib import crc32

import attrs

from powertrain.errors import CheckpointError, ShardCorrupt, ShardMissing, ShardTruncated, StorageError
from powertrain.roles.communicator import Handle
from powertrain.roles.files import FileEngine, RandomFile, Transfer
from powertrain_checkpoint.bands import Band, Check, Lent
from powertrain_checkpoint.keeping import Keeper
from powertrain_checkpoint.manifest import BLOCK, File
from powertrain_checkpoint.means import PAGE, Means

_GAP = 64 * 1024
"""Bytes that nobody needs, over which one read goes on rather than two being made."""

_LARGEST = 2 * (BLOCK + PAGE)
"""Bytes of a read that serves several bands, at most."""

_DEPTH = 3
"""Reads under way at once, beside the one that is waited for."""

_CHECKING = 2
"""Reads that are being checked and copied at once, beside the one that is waited for. All these fit into the ring."""

_STORES = 4
"""Slices on their way to where they rest."""

_OPEN_FILES = 64


@attrs.define(eq=False)
class Fetch:
    """One read, which serves one or more bands.

    Attributes:
        file: which of the manifest's.
        start: the first byte, at a page.
        stop: after the last.
        checks: the blocks in it, by their first byte.
        bands: what it serves.
    """

    file: int
    start: int
    stop: int
    checks: dict[int, Check]
    bands: list[Band]

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.stop - self.start


def fetches(bands: Iterable[Band], files: Sequence[File]) -> list[Fetch]:
    """Join bands that lie near one another and follow one another into reads of whole pages.

    Args:
        bands: in the order in which they are served.
        files: the manifest's.
    """
    result: list[Fetch] = []
    for band in bands:
        checks = {check[0]: check for check in band.checks}
        start = min(checks) // PAGE * PAGE
        stop = min(-(-max(check[1] for check in band.checks) // PAGE) * PAGE, files[band.file].size)
        last = result[-1] if result else None
        near = last is not None and last.file == band.file and last.start <= start <= last.stop + _GAP
        if last is not None and near and max(stop, last.stop) - last.start <= _LARGEST:
            last.stop = max(stop, last.stop)
            last.checks.update(checks)
            last.bands.append(band)
        else:
            result.append(Fetch(band.file, start, stop, checks, [band]))
    return result


class Fetcher:
    """Brings what a load needs: first only to verify it, then to copy it. Use it in a ``with`` block.

    What has been verified stays in memory as far as ``room`` goes; the rest is read, and verified, once more.

    Args:
        means: the file engine and threads.
        directory: of the checkpoint.
        files: the manifest's.
        wanted: what is needed, in order.
        room: bytes of memory that may be taken.
    """

    def __init__(
        self, means: Means, directory: Path, files: Sequence[File], wanted: Sequence[Fetch], room: int
    ) -> None:
        self._means, self._wanted = means, wanted
        self._files = _Files(means.engine, directory, files)
        self._keeper = Keeper(means.engine, room)
        self._kept: dict[Fetch, memoryview] = {}
        self._verifying, self._begin, self._arrived_bytes = False, 0.0, 0
        self._lent_out: dict[Fetch, memoryview] = {}
        ring = means.ring()
        self._spare = [ring[at : at + _LARGEST] for at in range(0, len(ring) - _LARGEST + 1, _LARGEST)]
        self._stores: deque[Handle] = deque()
        self._lent: Lent | None = None

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lent is not None:
            self._lent.release()
        self._files.close()

    def verify(self) -> None:
        """Read everything, compare it with its checksums, and keep what there is room for.

        Raises:
            ShardMissing, ShardTruncated, ShardCorrupt: a file is damaged.
            CheckpointError: the system refused.
        """
        self._verifying, self._begin, self._arrived_bytes = True, time.monotonic(), 0
        with self._means.crew() as crew:
            under_way: deque[tuple[Future[None], Fetch]] = deque()
            for fetch, view in self._arriving(self._wanted):
                under_way.append((crew.submit(self._check, fetch, view), fetch))
                if len(under_way) > _CHECKING:
                    self._end(*under_way.popleft())
            while under_way:
                self._end(*under_way.popleft())

    def copy(self) -> None:
        """Copy everything to where it is wanted. Targets at rest are lent, filled and stored one by one.

        Raises:
            ShardMissing, ShardTruncated, ShardCorrupt: a file is damaged by now.
            CheckpointError, StorageError: the system refused.
        """
        self._verifying = False
        with self._means.crew() as crew:
            under_way: deque[tuple[Future[None], Fetch, memoryview]] = deque()
            for fetch, view in self._present():
                under_way.append((self._hand_over(crew, fetch, view), fetch, view))
                if len(under_way) > _CHECKING:
                    self._deliver(*under_way.popleft())
            while under_way:
                self._deliver(*under_way.popleft())
        while self._stores:
            self._stores.popleft().wait()

    def _present(self) -> Iterator[tuple[Fetch, memoryview]]:
        """Yield everything that serves somebody, from memory or read again, in order."""
        again = self._arriving(
            [fetch for fetch in self._wanted if fetch not in self._kept and any(band.target for band in fetch.bands)]
        )
        for fetch in self._wanted:
            if fetch in self._kept:
                yield fetch, self._kept[fetch]
            elif any(band.target for band in fetch.bands):
                yield next(again)

    def _hand_over(self, crew: Executor, fetch: Fetch, view: memoryview) -> Future[None]:
        """Let a thread verify what was read again, and fill targets in the host's memory."""

        def work() -> None:
            if fetch not in self._kept:
                self._check(fetch, view)
            for band in fetch.bands:
                if band.on_host:
                    band.deliver(view[band.start - fetch.start : band.stop - fetch.start])

        return crew.submit(work)

    def _deliver(self, future: Future[None], fetch: Fetch, view: memoryview) -> None:
        """Fill the other targets here: tiers and streams belong to this thread."""
        future.result()
        for band in fetch.bands:
            if band.on_host:
                continue
            self._lent = band.lent
            band.deliver(view[band.start - fetch.start : band.stop - fetch.start])
            if band.lent is not None and (stored := band.lent.filled()) is not None:
                self._lent = None
                self._stores.append(stored)
                if len(self._stores) > _STORES:
                    self._stores.popleft().wait()
        self._put_back(fetch)

    def _arriving(self, wanted: Iterable[Fetch]) -> Iterator[tuple[Fetch, memoryview]]:
        """Yield fetches with their bytes, with more reads under way; each is to be put back."""
        reading: deque[tuple[Fetch, memoryview, RandomFile, Transfer]] = deque()
        for fetch in wanted:
            file = self._files[fetch.file]
            view = self._take(fetch)
            reading.append((fetch, view, file, file.read(fetch.start, view)))
            if len(reading) > _DEPTH:
                yield self._arrived(*reading.popleft())
        while reading:
            yield self._arrived(*reading.popleft())

    def _arrived(
        self, fetch: Fetch, view: memoryview, file: RandomFile, transfer: Transfer
    ) -> tuple[Fetch, memoryview]:
        try:
            transfer.wait()
        except StorageError as error:
            raise self._files.explain(fetch.file, error) from error
        self._arrived_bytes += fetch.nbytes
        return fetch, view

    def _speed(self) -> float:
        """Return the bytes that have been read in a second, not counting the time that memory took."""
        return self._arrived_bytes / max(time.monotonic() - self._begin - self._keeper.seconds, 1e-3)

    def _check(self, fetch: Fetch, view: memoryview) -> None:
        for start, stop, checksum in fetch.checks.values():
            if crc32(view[start - fetch.start : stop - fetch.start]) != checksum:
                raise self._files.corrupt(fetch.file, start, stop)

    def _end(self, future: Future[None], fetch: Fetch) -> None:
        future.result()
        self._put_back(fetch)

    def _take(self, fetch: Fetch) -> memoryview:
        if self._verifying and self._arrived_bytes:  # how fast the disk is is known
            kept = self._keeper.take(fetch.nbytes, self._speed())
            if kept is not None:
                self._kept[fetch] = kept
                return kept
        whole = self._spare.pop() if self._spare and fetch.nbytes <= _LARGEST else None
        whole = whole or self._means.engine.buffer(max(fetch.nbytes, _LARGEST))
        self._lent_out[fetch] = whole
        return whole[: fetch.nbytes]

    def _put_back(self, fetch: Fetch) -> None:
        whole = self._lent_out.pop(fetch, None)
        if whole is not None and len(whole) == _LARGEST:
            self._spare.append(whole)


class _Files:
    """A checkpoint's files, opened when needed; the longest open is closed for another."""

    def __init__(self, engine: FileEngine, directory: Path, files: Sequence[File]) -> None:
        self._engine, self._directory, self._files = engine, directory, files
        self._open: dict[int, RandomFile] = {}

    def __getitem__(self, index: int) -> RandomFile:
        if index not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            try:
                self._open[index] = self._engine.open(self._path(index), "read")
            except StorageError as error:
                raise self.explain(index, error) from error
        return self._open[index]

    def _path(self, index: int) -> Path:
        return self._directory / self._files[index].name

    def explain(self, index: int, error: StorageError) -> CheckpointError:
        """Return what a refusal of the system means."""
        path = self._path(index)
        if not path.exists():
            return ShardMissing(f"the manifest lists {path.name}, which is not there", where=str(path))
        size = path.stat().st_size
        if size < self._files[index].size:
            return ShardTruncated(
                f"{path.name} has become shorter",
                where=str(path),
                expected=f"{self._files[index].size:,} bytes",
                found=f"{size:,} bytes",
            )
        return CheckpointError(
            error.message, where=error.where, expected=error.expected, found=error.found, remedy=error.remedy
        )

    def corrupt(self, index: int, start: int, stop: int) -> ShardCorrupt:
        """Return what a wrong checksum means."""
        path = self._path(index)
        return ShardCorrupt(f"{path.name} was altered after it was saved", where=f"{path}, bytes {start:,} to {stop:,}")

    def close(self) -> None:
        """Wait for all transfers and close them."""
        while self._open:
            self._open.popitem()[1].close()
