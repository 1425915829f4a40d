"""Times that were measured once on a host, in the directory of what can be made again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Any

import torch

from powertrain.environment import cache_directory
from powertrain.native.toolchain import processor
from powertrain_comm.algorithms import Times, times_from_json, times_to_json

_log = logging.getLogger("powertrain.comm")

VERSION = 1
"""Of the file and of what is measured; another one is measured anew."""


def facts(ranks: int, hosts: int) -> dict[str, Any]:
    """Return what the times of ``ranks`` ranks on ``hosts`` hosts hold for: this host, its cores and this torch."""
    return {
        "version": VERSION,
        "host": socket.gethostname(),
        "processor": hashlib.sha256(processor().encode()).hexdigest()[:16],
        "cores": _cores(),
        "torch": torch.__version__,
        "ranks": ranks,
        "hosts": hosts,
    }


def place(facts: dict[str, Any]) -> Path:
    """Return the file of the times that hold for ``facts``."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / "comm" / f"{facts['ranks']}-ranks-{digest}.json"


def load(facts: dict[str, Any]) -> Times | None:
    """Return the times that hold for ``facts``; None where there are none, or the file is damaged."""
    file = place(facts)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("%s cannot be read and is measured anew: %s", file, error)
        return None
    times = times_from_json(found.get("seconds")) if isinstance(found, dict) else None
    if times is None or found.get("facts") != facts:
        _log.warning("%s does not hold what it should and is measured anew", file)
        return None
    return times


def save(facts: dict[str, Any], times: Times) -> None:
    """Keep ``times`` for later runs; a directory that cannot be written costs them the measuring, nothing else."""
    file = place(facts)
    aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    text = json.dumps({"facts": facts, "seconds": times_to_json(times)}, indent=1) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        _log.warning("the times of collectives cannot be kept, and are measured at every start: %s", error)
        with contextlib.suppress(OSError):
            aside.unlink()


def _cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
