"""Slots over one Python file, and file engines that are slow or fail: what tests need of tiers and disks."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from powertrain.errors import StorageFull, TransferFailed
from powertrain.roles.communicator import Done
from powertrain.roles.files import FileEngine, RandomFile
from powertrain.roles.tier import Lease, Slot
from powertrain_checkpoint import bands, fetching, image, manifest, means, streaming
from powertrain_checkpoint.plain import PlainEngine

BLOCK = 4096
"""Bytes under one checksum, after ``shrink``."""


def shrink(monkeypatch) -> None:
    """Cut everything into small pieces, so that small tensors take every path of the checkpoint plugin."""
    for module in (image, bands, manifest):
        monkeypatch.setattr(module, "BLOCK", BLOCK)
    monkeypatch.setattr(bands, "LENGTH", BLOCK)
    monkeypatch.setattr(bands, "SPAN", 4 * BLOCK)
    monkeypatch.setattr(bands, "_LENT", 4 * BLOCK)
    monkeypatch.setattr(fetching, "_LARGEST", 2 * (BLOCK + 4096))
    monkeypatch.setattr(fetching, "_GAP", 64)
    monkeypatch.setattr(means, "RING", 8 * BLOCK)
    monkeypatch.setattr(streaming, "WINDOW", BLOCK)
    monkeypatch.setattr(streaming, "_SMALL", 100)


class Rest:
    """A file in which slots lie one after the other; counts the bytes on loan."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        weakref.finalize(self, os.close, self.file)
        self.end = self.loaned = self.peak = self.stores = 0
        self.owner = threading.get_ident()

    def reserve(self, nbytes: int) -> RestingSlot:
        slot = RestingSlot(self, self.end, nbytes)
        self.end += nbytes
        return slot

    def put(self, tensor: torch.Tensor) -> RestingSlot:
        slot = self.reserve(tensor.numel() * tensor.element_size())
        os.pwrite(self.file, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), slot.offset)
        return slot

    def content(self) -> bytes:
        return os.pread(self.file, os.fstat(self.file).st_size, 0)


class RestingSlot(Slot):
    def __init__(self, rest: Rest, offset: int, nbytes: int) -> None:
        self.rest, self.offset, self.nbytes, self.device = rest, offset, nbytes, torch.device("cpu")

    def fetch(self, start=0, stop=None, device=None):
        return RestingLease(self, start, self.nbytes if stop is None else stop, full=True)

    def blank(self, start=0, stop=None, device=None):
        return RestingLease(self, start, self.nbytes if stop is None else stop, full=False)

    def free(self) -> None:
        pass


class RestingLease(Lease):
    def __init__(self, slot: RestingSlot, start: int, stop: int, *, full: bool) -> None:
        self.rest, self.at, self.nbytes, self.full = slot.rest, slot.offset + start, stop - start, full
        assert threading.get_ident() == self.rest.owner, "a tier was used by another thread"
        self.rest.loaned += self.nbytes
        self.rest.peak = max(self.rest.peak, self.rest.loaned)
        self.over = False

    def wait(self):
        content = bytearray(b"\xaa" * self.nbytes)
        if self.full:
            content = bytearray(os.pread(self.rest.file, self.nbytes, self.at))
        self.tensor = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        return self.tensor

    def store(self):
        os.pwrite(self.rest.file, self.tensor.numpy().tobytes(), self.at)
        self.rest.stores += 1
        self.release()
        return Done()

    def release(self) -> None:
        assert threading.get_ident() == self.rest.owner, "a tier was used by another thread"
        assert not self.over
        self.over = True
        self.rest.loaned -= self.nbytes
        self.tensor.fill_(0x55) if hasattr(self, "tensor") else None


class LateEngine(FileEngine):
    """Moves bytes only when somebody waits for them; fails where ``fail`` says so.

    Args:
        fail: told what is done ("write", "read", "resize", "sync"), the path, and the byte after the last; returns
            whether that fails.
    """

    name, alignment = "late", 4096

    def __init__(self, fail: Callable[[str, str, int], bool] = lambda *_: False) -> None:
        self.inner, self.fail, self.files, self.closed = PlainEngine(), fail, [], False

    def buffer(self, nbytes):
        return self.inner.buffer(nbytes)

    def open(self, paths, mode):
        file = LateFile(self, self.inner.open(paths, mode), str(paths))
        self.files.append(file)
        return file

    def close(self):
        assert all(file.closed for file in self.files), "a file was left open"
        self.closed = True


class LateFile(RandomFile):
    def __init__(self, engine: LateEngine, inner: RandomFile, path: str) -> None:
        self.engine, self.inner, self.path = engine, inner, path
        self.size, self.moves, self.closed = inner.size, [], False

    def _start(self, what, offset, view):
        move = Late(self, what, offset, view)
        self.moves.append(move)
        return move

    def read(self, offset, into):
        return self._start("read", offset, into)

    def write(self, offset, data):
        return self._start("write", offset, data)

    def resize(self, size):
        if self.engine.fail("resize", self.path, size):
            raise StorageFull(f"no room for {self.path}", where=self.path, expected=f"{size} bytes", found="7 bytes")
        self.inner.resize(size)
        self.size = size

    def sync(self):
        for move in self.moves:
            move.wait()
        if self.engine.fail("sync", self.path, self.size):
            raise TransferFailed(f"forcing {self.path} to the disk failed", where=self.path)
        self.inner.sync()

    def close(self):
        self.closed = True
        self.inner.close()


class Late:
    def __init__(self, file: LateFile, what: str, offset: int, view: memoryview) -> None:
        self.file, self.what, self.offset, self.view, self.over = file, what, offset, view, False

    def done(self) -> bool:
        return self.over

    def wait(self) -> None:
        if self.over:
            return
        self.over = True
        if self.file.engine.fail(self.what, self.file.path, self.offset + len(self.view)):
            raise TransferFailed(
                f"{self.what} of {self.file.path} failed",
                where=f"{self.file.path}, byte {self.offset}",
                expected=f"{len(self.view)} bytes",
                found="3 bytes before it failed",
            )
        if self.what == "write":
            self.file.inner.write(self.offset, self.view).wait()
        else:
            self.file.inner.read(self.offset, self.view).wait()
