"""Tries the engines in C++ on a file of several parts, byte by byte against a copy in memory."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from powertrain import native
from powertrain.native import Finding
from powertrain_offload.io.engine import Engine
from powertrain_offload.io.native import NativeEngine
from powertrain_offload.io.settings import Settings
from powertrain_offload.io.source import SOURCE

SIZE = 1 << 20
STRIPE = 1 << 16
ROUNDS = 40


def check(rounds: int = ROUNDS) -> Iterator[Finding]:
    """Build the module where it is not, and try each engine that this kernel allows on random pieces."""
    module = native.load(SOURCE)
    for kind in ("uring", "direct"):
        settings = Settings(block=1 << 14, depth=4, threads=3)
        try:
            engine = NativeEngine(module, "uring" if kind == "uring" else "direct", settings)
        except RuntimeError as error:
            yield Finding(kind, f"not here: {error}", 0, 0.0)
            continue
        with engine, tempfile.TemporaryDirectory() as place:
            draw = random.Random(kind)
            for parts in (1, 3):
                paths = [Path(place) / f"{parts}-{number}" for number in range(parts)]
                wrong = _tried(engine, paths, draw, rounds)
                how = "direct" if wrong[1] else "buffered"
                yield Finding(kind, f"{parts} part{'s' if parts > 1 else ''}, {how}", rounds, wrong[0])


def _tried(engine: Engine, paths: list[Path], draw: random.Random, rounds: int) -> tuple[float, bool]:
    """Write and read random pieces; return infinity if a byte was wrong, and whether transfers were direct."""
    right = bytearray(SIZE)
    memory = engine.buffer(2 * SIZE)
    wrong = False
    with engine.open(paths, "create", stripe=STRIPE) as file:
        file.resize(SIZE)
        for _ in range(rounds):
            step = draw.choice((1, 512, 4096))
            offset = draw.randrange(0, SIZE, step)
            length = draw.randint(0, (SIZE - offset) // step) * step
            start = draw.randrange(0, SIZE, draw.choice((1, 4096)))
            piece = memory[start : start + length]
            if draw.random() < 0.5:
                data = draw.randbytes(length)
                piece[:] = data
                file.write(offset, piece).wait()
                right[offset : offset + length] = data
            else:
                file.read(offset, piece).wait()
                wrong |= piece != right[offset : offset + length]
        whole = memory[:SIZE]
        file.read(0, whole).wait()
        return float("inf") if wrong or whole != right else 0.0, file.direct
