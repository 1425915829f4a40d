"""Where in the code a collective came from."""

from __future__ import annotations

import sys
import threading
from types import FrameType

Site = tuple[str, int, str, int]
"""File and line of the user's frame, then of the innermost caller; an empty file where there is none."""

USER, CALLER, PLUMBING = range(3)

DEEPEST = 80
"""Frames that are walked at most."""


class SiteFinder:
    """Finds the frames that a person wants to see.

    The innermost caller is the first frame outside this plugin, the
    communicator role, torch and threading; the user's frame is the first one outside all
    powertrain packages.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, int] = {}

    def find(self, depth: int) -> Site:
        """Return the site of the call ``depth`` frames above this one."""
        return self.of(sys._getframe(depth + 1))

    def of(self, frame: FrameType | None) -> Site:
        """Return the site of a frame."""
        kinds = self._kinds
        file, line = "", 0
        for _ in range(DEEPEST):
            if frame is None:
                break
            name = frame.f_globals.get("__name__", "")
            kind = kinds.get(name)
            if kind is None:
                kind = kinds[name] = _kind(name)
            if kind == USER:
                user = frame.f_code.co_filename, frame.f_lineno
                return (*user, file, line) if file else (*user, *user)
            if kind == CALLER and not file:
                file, line = frame.f_code.co_filename, frame.f_lineno
            frame = frame.f_back
        return "", 0, file, line

    def now(self) -> str:
        """Return where the main thread is."""
        return show(self.of(sys._current_frames().get(threading.main_thread().ident or 0)))


def _kind(module: str) -> int:
    package = module.partition(".")[0]
    if package in ("powertrain_comm", "torch", "threading") or module == "powertrain.roles.communicator":
        return PLUMBING
    return CALLER if package == "powertrain" or package.startswith("powertrain_") else USER


def show(site: Site) -> str:
    """Return a site as ``file:line``, with the innermost caller where that is another."""
    user, user_line, caller, line = site
    if not user:
        return f"{caller}:{line}" if caller else "?"
    inner = "" if (caller, line) == (user, user_line) else f" (in {caller}:{line})"
    return f"{user}:{user_line}{inner}"
