"""A rank's last collectives in a file, readable after the rank has crashed.

gloo aborts the process when the lengths of a collective differ: nothing runs
any more that could tell the other ranks what this one had issued. Ranks of the
same host read its file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

from powertrain_comm.watchdog.records import Kind, Record

SLOT = struct.Struct("<IIII")
"""Order of issue, number along the dimension, and place and length of the description."""

PACK, SLOT_SIZE = SLOT.pack_into, SLOT.size

SLOTS = 64
"""Collectives that are kept."""

TEXT = SLOT_SIZE * SLOTS
"""Where the descriptions begin."""

SIZE = 1 << 18
"""Bytes of the file; most pages are never touched."""

PREFIX, SUFFIX = "powertrain-", ".collectives"
"""Every such file in the directory for temporary files is a black box."""

FRESH = 60.0
"""Seconds in which a file may be there and not be locked yet."""


class BlackBox:
    """Writes one rank's file; a description that was written before is written no second time.

    The file is locked for as long as the process lives. What processes that
    were killed left behind is removed when the next one starts.
    """

    def __init__(self) -> None:
        _sweep()
        descriptor, path = tempfile.mkstemp(prefix=PREFIX, suffix=SUFFIX)
        self.path = Path(path)
        try:
            # The map holds a copy of the descriptor, and with it the lock. A file system without locks has no sweep.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, SIZE)
            self._map = mmap.mmap(descriptor, SIZE)
        finally:
            os.close(descriptor)
        self._page = 1
        self._end = TEXT
        self._order = 0

    def write(self, record: Record) -> None:
        """Keep a collective that is about to start."""
        kind = record.kind
        if kind.page != self._page:
            self._describe(kind)
        self._order = order = self._order + 1
        PACK(self._map, order % SLOTS * SLOT_SIZE, order, record.number, kind.start, kind.length)

    def _describe(self, kind: Kind) -> None:
        text = json.dumps(kind.facts()).encode()[: SIZE - TEXT]
        if self._end + len(text) > SIZE:
            self._page += 1
            self._end = TEXT
        kind.page, kind.start, kind.length = self._page, self._end, len(text)
        self._end += len(text)
        self._map[kind.start : self._end] = text

    def close(self) -> None:
        """Remove the file; closing twice does nothing."""
        self.path.unlink(missing_ok=True)
        self._map.close()


def _sweep() -> None:
    """Remove this user's files that no process holds any more."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*{SUFFIX}"):
        with contextlib.suppress(OSError):  # it is locked, or another rank was faster
            facts = path.lstat()
            if facts.st_uid != os.getuid() or time.time() - facts.st_mtime < FRESH:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def read(path: str) -> dict[str, Any] | None:
    """Return what the file of a crashed rank holds, as ``Ledger.state`` does; None if it is on another host."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return None
    slots = sorted(SLOT.iter_unpack(data[:TEXT]))
    records, counts = [], {}
    for order, number, start, length in slots:
        # A description that was overwritten since is no JSON.
        with contextlib.suppress(ValueError):
            if order:
                facts = {**json.loads(data[start : start + length]), "number": number, "age": 0.0, "waiting": False}
                records.append(facts)
                if facts["operation"] not in ("send", "receive"):
                    counts[facts["dimension"]] = number
    return {"records": records, "counts": counts, "now": "?"}
