"""What each launched rank runs: the user's script, with failures put into words.

``python -m powertrain.cli.worker REPORTS script|module NAME ARGUMENTS…``

The script runs as ``__main__`` exactly as under plain ``python``. The ranks
of one agent share the directory REPORTS: of an error that all of them have,
one rank tells.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType

from powertrain import logs
from powertrain.environment import Rank, log_level, variables
from powertrain.errors import PeerFailed, PowertrainError

FULL_REPORTS = 3
"""So many different errors are told in full; further ones in one line each."""


def main(arguments: list[str]) -> int:
    """Run the script that ``arguments`` name and return the rank's exit code."""
    reports, kind, name, *rest = arguments
    _die_with_launcher()
    reporter = _Reporter(Path(reports), Rank())
    sys.excepthook = reporter.hook
    try:
        reporter.rank = Rank.from_environment()
        logs.configure(reporter.rank.index)
        _run(kind, name, rest)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        error.__traceback__ = _own_frames(error.__traceback__)
        # As under plain `python`: what was hooked in before the script failed learns of it, the watchdog above all.
        sys.excepthook(type(error), error, error.__traceback__)
        return error.exit_code if isinstance(error, PowertrainError) else 1
    return 0


def _run(kind: str, name: str, arguments: list[str]) -> None:
    sys.argv = [name, *arguments]
    if kind == "module":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    # `python -m` put the working directory first, `python script.py` puts the script's own.
    here = Path(name).resolve()
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(here if here.is_dir() else here.parent)
    runpy.run_path(name, run_name="__main__")


def _own_frames(trace: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the script's first frame on; None when it never ran."""
    ours = (__file__, runpy.run_path.__code__.co_filename)
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace


class _Reporter:
    """Tells an error once for all ranks of this host."""

    def __init__(self, directory: Path, rank: Rank) -> None:
        self.directory = directory
        self.attempt = variables("TORCHELASTIC_RESTART_COUNT").get("TORCHELASTIC_RESTART_COUNT", "0")
        self.rank = rank
        self.stream = sys.stderr  # torch's own hook puts another in its place, to write the rank once more

    def hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Tell ``error``, as the first link of ``sys.excepthook``: a mistake in words, a surprise by traceback."""
        if isinstance(error, PowertrainError) and log_level() != "debug":
            self.tell(f"Error: {error}\n", error.exit_code, brief=isinstance(error, PeerFailed))
        else:
            self.tell("".join(traceback.format_exception(kind, error, trace)), getattr(error, "exit_code", 1))

    def tell(self, text: str, code: int, *, brief: bool = False) -> None:
        """Write ``text`` on standard error unless another rank has told the same.

        The first rank that tells leaves its pid and exit ``code`` to the launcher.
        """
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if not self._claim(f"told-{self.attempt}-{digest}"):
            return
        if not brief:
            self._claim(f"first-{self.attempt}", f"{os.getpid()} {code}")
        label = f"[rank {self.rank.index}] " if self.rank.world_size > 1 else ""
        full = not brief and any(self._claim(f"full-{self.attempt}-{slot}") for slot in range(FULL_REPORTS))
        if not full:
            lines = text.strip().splitlines()
            # The first line of words, the last one of a traceback.
            text = (lines[-1] if lines[0].startswith("Traceback") else lines[0]) + "\n"
        self.stream.write(label + text)
        self.stream.flush()

    def _claim(self, name: str, content: str = "") -> bool:
        try:
            with (self.directory / name).open("x") as file:
                file.write(content)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True


def _die_with_launcher() -> None:
    """Ask Linux to kill this process when the launcher is gone, even by kill -9."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
