"""Moves bytes between memory and files, many at a time, past the page cache where the file system allows it.

    import tempfile
    from powertrain_offload import io

    with tempfile.TemporaryDirectory() as place, io.open_engine("auto", depth=8) as engine:
        memory = engine.buffer(1 << 20)  # torch.frombuffer(memory, dtype=...) shares it
        memory[:5] = b"state"
        with engine.open(f"{place}/state", "create") as file:
            file.resize(1 << 20)
            written = file.write(0, memory)  # under way; the memory is left alone until
            written.wait()  # this returns, or raises TransferFailed
            file.sync()
            found = bytearray(5)
            file.read(0, memoryview(found)).wait()  # any offset, any length, any memory
        assert bytes(found) == b"state"

Three kinds of engine do the same: "uring" (the kernel's io_uring), "direct" (threads in C++) and "threads" (threads in
Python, for any system and without a compiler). "auto" takes the first of them that works.

Whole blocks, of a file system that has direct transfers, go past the page cache; what lies before the first block's
boundary and after the last one's goes through it. The kernel keeps both alike, so bytes that were written one way are
read the other way as they should be. Transfers that are under way at the same time may touch the same block, but
must not touch the same bytes, unless all of them read. What has not been ``sync``ed is lost when the machine stops.

An engine serves any number of files and of Python's threads. It belongs to the process that opened it: in a process
that was forked off, it raises EngineUnavailable. At the end of a process, blocks that have not begun are dropped.
"""

from __future__ import annotations

from powertrain_offload.io.engine import Engine
from powertrain_offload.io.file import StripedFile
from powertrain_offload.io.kinds import KINDS, available, open_engine
from powertrain_offload.io.settings import BLOCK, DEPTH, STRIPE, THREADS

__all__ = ["BLOCK", "DEPTH", "KINDS", "STRIPE", "THREADS", "Engine", "StripedFile", "available", "open_engine"]
