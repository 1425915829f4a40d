"""What the three engines have in common."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from powertrain.errors import StorageUnwritable
from powertrain.roles.files import FileEngine
from powertrain.roles.files import Path as FilePath
from powertrain_offload.io import memory
from powertrain_offload.io.file import StripedFile
from powertrain_offload.io.moving import Moving
from powertrain_offload.io.owner import Owner
from powertrain_offload.io.part import Alignment, Mode, Part
from powertrain_offload.io.settings import STRIPE, Settings


class Engine(FileEngine):
    """A way to move bytes; ``open_engine`` makes one. Use it in a ``with`` block, or ``close`` it.

    Attributes:
        name: "uring", "direct" or "threads".
        alignment: of offsets, lengths and addresses, in bytes, that is right for every file here.
        settings: how transfers are cut, and how much travels at once.
    """

    alignment = 4096
    log = logging.getLogger("powertrain.offload")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.owner = Owner()
        self._files: weakref.WeakSet[StripedFile] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False

    # --- what an engine is made of ------------------------------------------------------

    @abstractmethod
    def attach(self, parts: Sequence[Part], stripe: int) -> Any:
        """Return what ``start`` needs to know of a file."""

    @abstractmethod
    def start(self, attached: Any, writes: bool, offset: int, view: memoryview) -> Moving:
        """Start to move the bytes of ``view``; who calls has checked it."""

    @abstractmethod
    def _stop(self) -> None:
        """Give threads and queues up; all transfers are over."""

    def _alignment(self) -> Alignment | None:
        """Return what tells a file's alignment; None: this engine has no direct transfers."""
        return None

    # --- what callers use ---------------------------------------------------------------

    def buffer(self, nbytes: int) -> memoryview:
        """Return zeroed, writable memory that starts at a page; its last reference frees it."""
        return memory.buffer(nbytes)

    def open(self, paths: FilePath | Sequence[FilePath], mode: Mode, *, stripe: int = STRIPE) -> StripedFile:
        """Open one logical file.

        Args:
            paths: the file; or several, over which its content is striped, always the same in the same order.
            mode: "create" makes new, empty files and fails if one exists; "read" and "update" open what is there.
            stripe: bytes of one file before the next one's turn, a multiple of 64 KiB; always the same.

        Raises:
            StorageUnwritable: it cannot be opened.
            EngineUnavailable: in a process that was forked off.
            ValueError: no path, an unknown mode, or a stripe that does not fit blocks.
        """
        self.check()
        names = [os.fspath(paths)] if isinstance(paths, (str, os.PathLike)) else [os.fspath(path) for path in paths]
        if not names:
            raise ValueError("paths: expected a path at the least, found none")
        if mode not in ("create", "read", "update"):
            raise ValueError(f"mode: expected 'create', 'read' or 'update', found {mode!r}")
        if stripe < 1 << 16 or stripe % (1 << 16):
            raise ValueError(f"stripe: expected a multiple of 65536 (bytes), found {stripe}")
        parts: list[Part] = []
        try:
            for name in names:
                parts.append(Part.open(name, mode, self._alignment()))  # noqa: PERF401 (all are closed if one fails)
            with self._lock:
                self.check()
                file = StripedFile(self, parts, stripe)
                self._files.add(file)
        except (StorageUnwritable, ValueError):
            for part in parts:
                part.close()
                if mode == "create":
                    os.unlink(part.path)  # noqa: PTH108 (a name as it was given)
            raise
        if file.why_buffered and self._alignment() is not None:
            self.log.debug("%s goes through the page cache: %s", file.paths[0], file.why_buffered)
        return file

    def check(self) -> None:
        """Raise where the engine cannot be used.

        Raises:
            EngineUnavailable: in a process that was forked off.
            ValueError: it is closed.
        """
        self.owner.check()
        if self._closed:
            raise ValueError("this file engine is closed")

    def forget(self, file: StripedFile) -> None:
        """Take a file for closed."""
        self._files.discard(file)

    def close(self) -> None:
        """Wait for all transfers and give threads and queues up; a second call does nothing.

        Files stay open until they are closed themselves, but start nothing more.
        """
        if self._closed or not self.owner.here():
            return
        for file in list(self._files):
            if (error := file.settle()) is not None:
                self.log.warning("a transfer failed and nobody waited for it: %s", error)
        with self._lock:
            self._closed = True
        self._stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
