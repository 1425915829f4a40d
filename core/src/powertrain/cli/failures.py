"""What a command says when it fails, and the code it exits with.

====  =======================================================
code  meaning
====  =======================================================
0     it worked
1     the run failed, or the reader of the output went away
2     usage or configuration: the user can mend it at once
130   interrupted from the keyboard
====  =======================================================
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import click

from powertrain.environment import log_level
from powertrain.errors import PowertrainError

INTERRUPTED = 130


def guarded(body: Callable[[], object]) -> int:
    """Run ``body``, report what it raises on standard error, and return the exit code."""
    try:
        code = body()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SystemExit as exit:
        return _code_of(exit)
    except click.exceptions.Exit as exit:
        return exit.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PowertrainError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except OSError as error:
        return _system(error)
    except Exception as error:
        return _internal(error)


def _code_of(exit: SystemExit) -> int:
    if exit.code is None:
        return 0
    if isinstance(exit.code, int):
        return exit.code
    click.echo(str(exit.code), err=True)
    return 1


def _system(error: OSError) -> int:
    if error.errno == errno.EPIPE:
        # The interpreter flushes standard output once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    if error.filename is None or error.strerror is None:
        return _internal(error)
    click.echo(f"Error: {error.filename}: {error.strerror}", err=True)
    return 1


def _internal(error: Exception) -> int:
    if _debugging():
        traceback.print_exception(error)
        return 1
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    click.echo(
        f"Error: internal error: {type(error).__name__}: {error}{place}\n"
        "  to fix: run it again with POWERTRAIN_LOG=debug for the traceback, and report that",
        err=True,
    )
    return 1


def _debugging() -> bool:
    try:
        return log_level() == "debug"
    except PowertrainError:
        return False
