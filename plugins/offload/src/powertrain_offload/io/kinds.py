"""Which engines work here, and opening one."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Literal

from powertrain import native
from powertrain.environment import native_wanted
from powertrain.errors import EngineUnavailable, NativeError
from powertrain_offload.io.engine import Engine
from powertrain_offload.io.native import NativeEngine
from powertrain_offload.io.settings import BLOCK, DEPTH, THREADS, Settings
from powertrain_offload.io.source import SOURCE
from powertrain_offload.io.threads import ThreadsEngine

Kind = Literal["uring", "direct", "threads"]
KINDS: tuple[Kind, ...] = ("uring", "direct", "threads")
"""The fastest first."""

_log = logging.getLogger("powertrain.offload")


def open_engine(
    kind: str = "auto", *, block: int | None = None, depth: int | None = None, threads: int | None = None
) -> Engine:
    """Open an engine.

    Args:
        kind: "uring", "direct" or "threads"; "auto": the first of these that works here.
        block: bytes that one system call moves at most, a multiple of 4096; None: 1 MiB.
        depth: blocks under way at once, for "uring"; None: 128. Memory that is not aligned costs as many blocks more.
        threads: with one block under way each, for the others; None: 8.

    Raises:
        EngineUnavailable: this kind does not work here; says why.
        ValueError: an unknown kind, or a number that no engine can work with.
    """
    settings = Settings(
        BLOCK if block is None else block,
        DEPTH if depth is None else depth,
        THREADS if threads is None else threads,
    )
    if kind == "auto":
        return _fastest(settings)
    if kind not in KINDS:
        raise ValueError(f"kind: expected 'auto', {', '.join(map(repr, KINDS))}, found {kind!r}")
    made = _make(kind, settings)
    if isinstance(made, str):
        raise EngineUnavailable(
            f"the file engine {kind!r} does not work here", expected=f"a system that can run {kind!r}", found=made
        )
    return made


def available() -> dict[Kind, str | None]:
    """Return each kind of engine, with None if it works here, or why it does not. Builds the C++ if need be."""
    result: dict[Kind, str | None] = {}
    for kind in KINDS:
        made = _make(kind, Settings())
        result[kind] = made if isinstance(made, str) else None
        if isinstance(made, Engine):
            made.close()
    return result


def _fastest(settings: Settings) -> Engine:
    refusals: list[str] = []
    for kind in KINDS:
        made = _make(kind, settings)
        if isinstance(made, Engine):
            _log.debug("file engine %s%s", kind, "".join(f"; not {refusal}" for refusal in refusals))
            return made
        refusals.append(f"{kind}: {made}")
    raise AssertionError("threads always work")


def _make(kind: str, settings: Settings) -> Engine | str:
    """Return an engine, or why there is none."""
    if kind == "threads":
        return ThreadsEngine(settings)
    module = _module()
    if isinstance(module, str):
        return module
    try:
        return NativeEngine(module, "uring" if kind == "uring" else "direct", settings)
    except RuntimeError as error:
        return str(error)


def _module() -> ModuleType | str:
    """Return the C++, or why there is none."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux"
    if not native_wanted():
        return "POWERTRAIN_NATIVE=0: no C++ is used"
    try:
        return native.load(SOURCE)
    except NativeError as error:
        return f"{error.message}: {error.remedy}"
