"""A module of C++ that compiles in a moment, and compilers with a fault, for the tests of ``powertrain.native``.

The module uses Python's own C interface, since pybind11 alone takes ten seconds.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from powertrain import native

TINY = """
#include <Python.h>
#include "answer.h"
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny", "", -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit_tiny() { return PyModule_Create(&module); }
"""

PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background is born deaf to Ctrl-C
from pathlib import Path
from powertrain import logs, native
logs.configure()
source = native.Source("tiny", Path(sys.argv[1]), (native.Unit("tiny.cpp", ("-O0",)),))
print("ready", flush=True)
while len(sys.argv) > 2 and not Path(sys.argv[2]).exists():
    time.sleep(0.01)
print(native.load(source).answer())
"""
"""Loads the tiny module, once the file that the second argument names is there."""

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")


def tiny(directory: Path, answer: int, *flags: str) -> native.Source:
    """Write the tiny module, whose one function returns ``answer``."""
    directory.mkdir(exist_ok=True)
    (directory / "tiny.cpp").write_text(TINY)
    (directory / "answer.h").write_text(f"#define ANSWER {answer}\n")
    return native.Source("tiny", directory, (native.Unit("tiny.cpp", ("-O0", *flags)),), ("answer",))


def compiler(path: Path, on_compile: str) -> str:
    """Write a compiler that does ``on_compile`` (shell) before it compiles a file, and return its path."""
    path.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) {on_compile};; esac\nexec c++ "$@"\n')
    path.chmod(0o755)
    return str(path)


def residue(cache: Path) -> list[str]:
    """Return what a build leaves in the cache beside what it built."""
    return sorted(path.name for path in cache.iterdir() if path.name.startswith(".") or path.suffix == ".lock")


LIMIT = 120
"""Seconds after which a test takes what it waits for to hang."""


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so; long before the test's own limit, say what was not."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.02)


def running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and waits for its parent to ask does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
