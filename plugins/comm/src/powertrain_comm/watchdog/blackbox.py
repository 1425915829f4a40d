"""A rank's last collectives in a file, readable after the rank has crashed.

gloo aborts the process when the lengths of a collective differ: nothing runs
any more that could tell the other ranks what this one had issued. Ranks of the
same host read its file.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

from powertrain_comm.watchdog.records import Record

SLOT = struct.Struct("<IIII")
"""Order of issue, number along the dimension, and place and length of the description."""

SLOTS = 64
"""Collectives that are kept."""

TEXT = SLOT.size * SLOTS
"""Where the descriptions begin."""

SIZE = 1 << 18
"""Bytes of the file; most pages are never touched."""


class BlackBox:
    """Writes one rank's file; a description that was written before is written no second time."""

    def __init__(self) -> None:
        descriptor, path = tempfile.mkstemp(prefix="powertrain-", suffix=".collectives")
        self.path = Path(path)
        try:
            os.ftruncate(descriptor, SIZE)
            self._map = mmap.mmap(descriptor, SIZE)
        finally:
            os.close(descriptor)
        self._known: dict[object, tuple[int, int]] = {}
        self._end = TEXT
        self._order = 0

    def write(self, record: Record) -> None:
        """Keep a collective that is about to start."""
        key = (record.operation, record.dimension, record.shape, record.dtype, record.label, record.site)
        place = self._known.get(key)
        if place is None:
            place = self._known[key] = self._describe(record)
        self._order += 1
        SLOT.pack_into(self._map, self._order % SLOTS * SLOT.size, self._order, record.number, *place)

    def _describe(self, record: Record) -> tuple[int, int]:
        text = json.dumps({**record.facts(record.started), "waiting": False}).encode()[: SIZE - TEXT]
        if self._end + len(text) > SIZE:
            self._known.clear()
            self._end = TEXT
        start, self._end = self._end, self._end + len(text)
        self._map[start : self._end] = text
        return start, len(text)

    def close(self) -> None:
        """Remove the file; closing twice does nothing."""
        self.path.unlink(missing_ok=True)
        self._map.close()


def read(path: str) -> dict[str, Any] | None:
    """Return what the file of a crashed rank holds, as ``Ledger.state`` does; None if it is on another host."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return None
    slots = sorted(SLOT.iter_unpack(data[:TEXT]))
    records, counts = [], {}
    for order, number, start, length in slots:
        # A description that was overwritten since is no JSON, or one of another number.
        with contextlib.suppress(ValueError):
            if order:
                facts = {**json.loads(data[start : start + length]), "number": number}
                records.append(facts)
                if facts["operation"] not in ("send", "receive"):
                    counts[facts["dimension"]] = number
    return {"records": records, "counts": counts, "now": "?"}
