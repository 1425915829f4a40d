"""File engines with one fault each: the contract must catch every one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from powertrain.errors import StorageFull, StorageUnwritable, TransferFailed
from powertrain.roles.files import FileEngine, RandomFile
from powertrain.testing.files import FileEngineContract

FLAGS = {"create": os.O_RDWR | os.O_CREAT | os.O_EXCL, "read": os.O_RDONLY, "update": os.O_RDWR}
STRIPE = 4096


class Move:
    """A transfer that was over when it began, and may have failed."""

    def __init__(self, file, error):
        self.file, self.error = file, error

    def wait(self):
        if self.error is not None:
            if self in self.file.failed:
                self.file.failed.remove(self)
            raise self.error

    def done(self):
        return True


class PlainFile(RandomFile):
    """Moves bytes at once, block by block, over several files in turn."""

    stripe = STRIPE

    def __init__(self, paths, descriptors):
        self.paths, self.descriptors = paths, descriptors
        self.failed = []
        sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
        self.size = sum(sizes)

    def spans(self, offset, length):
        """Yield (descriptor, path, offset in it, first byte, byte after the last) of each piece of a transfer."""
        start, count = 0, len(self.descriptors)
        while start < length:
            block, within = divmod(offset + start, self.stripe)
            size = min(self.stripe - within, length - start)
            yield block % count, block // count * self.stripe + within, start, start + size
            start += size

    def move(self, call, what, offset, view):
        moved = 0
        try:
            for part, place, first, last in self.spans(offset, len(view)):
                while first < last:
                    count = call(self.descriptors[part], view[first:last], place)
                    if not count:
                        raise OSError(0, "the file ended")
                    first, place, moved = first + count, place + count, moved + count
        except OSError as error:
            failure = TransferFailed(
                f"{what} {self.paths[part]} failed: {error.strerror}",
                where=self.paths[part],
                expected=f"{len(view)} bytes",
                found=f"{moved} bytes",
            )
            move = Move(self, failure)
            self.failed.append(move)
            return move
        return Move(self, None)

    def read(self, offset, into):
        call = lambda descriptor, view, place: os.preadv(descriptor, [view], place)  # noqa: E731
        return self.move(call, "reading", offset, memoryview(into).cast("B"))

    def write(self, offset, data):
        view = memoryview(data).cast("B")
        self.size = max(self.size, offset + len(view))
        return self.move(os.pwrite, "writing to", offset, view)

    def part_size(self, part, size):
        return sum(last - first for other, _, first, last in self.spans(0, size) if other == part)

    def resize(self, size):
        if size > 1 << 50:
            raise StorageFull("there is no room")
        for part, descriptor in enumerate(self.descriptors):
            os.ftruncate(descriptor, self.part_size(part, size))
        self.size = size

    def sync(self):
        if self.failed:
            self.failed.pop().wait()

    def close(self):
        while self.descriptors:
            os.close(self.descriptors.pop())


class Plain(FileEngine):
    """The simplest engine there can be."""

    name, alignment = "plain", 1
    file = PlainFile

    def buffer(self, nbytes):
        return memoryview(bytearray(nbytes))

    def open(self, paths, mode):
        names = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
        descriptors = []
        for name in names:
            try:
                descriptors.append(os.open(name, FLAGS[mode], 0o600))
            except OSError as error:
                for made, descriptor in zip(names, descriptors, strict=False):
                    os.close(descriptor)
                    if mode == "create":
                        Path(made).unlink()
                raise StorageUnwritable(f"{name} cannot be opened: {errno.errorcode[error.errno]}") from error
        return self.file(names, descriptors)

    def close(self):
        pass


def engine(**parts):
    """Return an engine whose file differs in some methods."""
    return type("Faulty", (Plain,), {"file": type("FaultyFile", (PlainFile,), parts)})


class OverwritesFiles(Plain):
    def open(self, paths, mode):
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            if mode == "create" and Path(path).exists():
                Path(path).unlink()
        return super().open(paths, mode)


class LeavesWhatItMade(Plain):
    def open(self, paths, mode):
        try:
            return super().open(paths, mode)
        except StorageUnwritable:
            if mode == "create" and not isinstance(paths, (str, os.PathLike)):
                Path(paths[0]).touch()
            raise


class MakesWhatIsMissing(Plain):
    def open(self, paths, mode):
        if not isinstance(paths, (str, os.PathLike)) or mode == "create":
            return super().open(paths, mode)
        Path(paths).touch()
        return super().open(paths, mode)


class GivesLess(Plain):
    def buffer(self, nbytes):
        return memoryview(bytearray(max(0, nbytes - 1)))


class LikesPages(Plain):
    alignment = 1 << 16


class ReadsInAnotherOrder(Plain):
    def open(self, paths, mode):
        alone = isinstance(paths, (str, os.PathLike))
        return super().open(paths if alone or mode == "create" else list(paths)[::-1], mode)


def late(self, offset, data):
    """Write only whole blocks."""
    return PlainFile.write(self, offset - offset % 512, data)


def unfilled(self, offset, into):
    """Take a short read for a whole one."""
    move = PlainFile.read(self, offset, into)
    self.failed.clear()
    return Move(self, None) if move.error is not None else move


def forgets(self):
    self.failed.clear()


def grows_only(self, size):
    if size > self.size:
        PlainFile.resize(self, size)


def closes_once(self):
    assert self.descriptors
    PlainFile.close(self)


FAULTS = {
    OverwritesFiles: "test_create_replaces_nothing",
    LeavesWhatItMade: "test_create_replaces_nothing",
    MakesWhatIsMissing: "test_what_is_not_there_is_not_made",
    GivesLess: "test_its_memory_is_as_long_as_asked_and_aligned",
    LikesPages: "test_its_memory_is_as_long_as_asked_and_aligned",
    engine(write=late): "test_a_file_holds_what_a_bytearray_holds",
    engine(read=unfilled): "test_a_file_that_ends_too_early",
    engine(sync=forgets): "test_a_disk_that_is_full",
    engine(resize=grows_only): "test_its_size_grows_and_shrinks",
    engine(close=closes_once): "test_closing_twice_is_harmless",
    ReadsInAnotherOrder: "test_what_was_written_is_there_when_it_is_opened_again",
}
"""Each fault, and the test that is there to catch it."""


def suite(made):
    class Suite(FileEngineContract):
        def make(self):
            return made()

    return Suite


def test_the_healthy_one_passes(contract):
    """An engine without a fault fails no test."""
    assert contract.failures(suite(Plain)) == []


@pytest.mark.parametrize(("fault", "test"), FAULTS.items(), ids=[str(number) for number in range(len(FAULTS))])
def test_the_fault_is_caught(contract, fault, test):
    """An engine with one fault fails the test that is there for it."""
    assert contract.failures(suite(fault), test), f"{test} passed"
