"""How a transfer is cut, and how much of it travels at once."""

from __future__ import annotations

import attrs

BLOCK = 1 << 20
"""Bytes that one system call moves, at most."""

DEPTH = 128
"""Blocks under way at once, with io_uring: enough that a disk has work until a busy processor comes back to it."""

THREADS = 8
"""Threads, each with one block under way, of the other engines."""

STRIPE = 1 << 20
"""Bytes of one file before the next one's turn. Part of the format: files written with another are read wrongly."""

STEP = 4096
LARGEST = 1 << 30


@attrs.frozen
class Settings:
    """What ``open_engine`` takes; all of it is checked here.

    Attributes:
        block: bytes, a multiple of 4096.
        depth: blocks under way.
        threads: of the engines that have them.

    Raises:
        ValueError: a value that no engine can work with.
    """

    block: int = BLOCK
    depth: int = DEPTH
    threads: int = THREADS

    def __attrs_post_init__(self) -> None:
        if not STEP <= self.block <= LARGEST or self.block % STEP:
            raise ValueError(f"block: expected a multiple of {STEP} up to {LARGEST} (bytes), found {self.block}")
        if not 1 <= self.depth <= 4096:
            raise ValueError(f"depth: expected 1 to 4096, found {self.depth}")
        if not 1 <= self.threads <= 256:
            raise ValueError(f"threads: expected 1 to 256, found {self.threads}")
