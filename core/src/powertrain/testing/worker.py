"""One process of the rank pool: receives calls on a pipe, answers with results.

Started by ``powertrain.testing.pool`` as
``python -m powertrain.testing.worker CALLS LIFELINE STACKS``, where the first
two are inherited file descriptors and the third a file for stack dumps.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs

LEAK_PATIENCE = 1.0
"""Seconds that a thread may take to end after the function returned."""


@attrs.frozen(kw_only=True)
class Call:
    """What a rank is asked to run.

    Attributes:
        modules: name and source file of the modules that the call needs, the function's first.
        qualname: the function's name within its module.
        arguments: the pickled ``(args, kwargs)``.
        variables: environment variables for the time of the call.
        directory: the working directory for the time of the call.
        path: the caller's ``sys.path``, so that both can import the same.
    """

    modules: tuple[tuple[str, str], ...]
    qualname: str
    arguments: bytes
    variables: dict[str, str]
    directory: str
    path: list[str]


@attrs.frozen(kw_only=True)
class Answer:
    """How a call ended on one rank.

    Attributes:
        result: the pickled return value; None after an exception.
        traceback: the exception's traceback; None after a return.
        error: the pickled exception, where it can be pickled.
        leaks: what the function left behind.
    """

    result: bytes | None = None
    traceback: str | None = None
    error: bytes | None = None
    leaks: tuple[str, ...] = ()


class Modules:
    """Finds the module of a function, by name where that works, else by its file.

    pytest's importlib mode gives test modules names that nobody can import, so
    their files are executed here once (again when they change) under the same
    name: classes pickled on one side are found on the other.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[int, ModuleType]] = {}

    def find(self, name: str, file: str) -> ModuleType:
        """Return the module, executing its file if it is new or has changed."""
        if file not in self._loaded:
            here = sys.modules.get(name)
            if here is not None and getattr(here, "__file__", None) == file:
                return here
            with contextlib.suppress(ImportError, ValueError):
                spec = importlib.util.find_spec(name)
                if spec is not None and spec.origin == file:
                    return importlib.import_module(name)
        changed = Path(file).stat().st_mtime_ns
        known = self._loaded.get(file)
        if known is not None and known[0] == changed:
            return known[1]
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is not a Python module")
        module = importlib.util.module_from_spec(spec)
        self._add_parents(name)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        self._loaded[file] = (changed, module)
        return module

    @staticmethod
    def _add_parents(name: str) -> None:
        """Put empty modules where pickle wants the parents of a dotted name."""
        for end in (i for i, letter in enumerate(name) if letter == "."):
            parent = name[:end]
            try:
                importlib.import_module(parent)
            except ImportError:
                sys.modules[parent] = ModuleType(parent)


@contextlib.contextmanager
def surroundings(call: Call) -> Iterator[None]:
    """Give the call its environment, directory, import path and random state; take them back."""
    import torch

    environment, directory, path = dict(os.environ), Path.cwd(), list(sys.path)
    os.environ.update(call.variables)
    os.chdir(call.directory)
    sys.path[:] = call.path
    random.seed(0)
    torch.manual_seed(0)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        sys.path[:] = path


def run(call: Call, modules: Modules) -> Answer:
    """Run one call and say how it ended."""
    before = set(threading.enumerate())
    answer: dict[str, Any] = {}
    with surroundings(call):
        try:
            home, *_ = [modules.find(name, file) for name, file in call.modules]
            function: Any = home
            for part in call.qualname.split("."):
                function = getattr(function, part)
            args, kwargs = pickle.loads(call.arguments)
            answer["result"] = pickle.dumps(function(*args, **kwargs))
        except BaseException as error:  # a rank that exits or is skipped has failed its call too
            answer["traceback"] = traceback.format_exc()
            with contextlib.suppress(Exception):
                answer["error"] = pickle.dumps(error)
        return Answer(**answer, leaks=tuple(leaks(before)))


def leaks(before: set[threading.Thread]) -> Iterator[str]:
    """Yield what a function left behind: threads that were not there ``before``, a process group."""
    deadline = time.monotonic() + LEAK_PATIENCE
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("Dummy-"):  # native threads that once ran Python code
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            yield f"the thread {thread.name!r} is still running"
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        yield "the default process group of torch.distributed is still open"


def follow(lifeline: int) -> None:
    """End this process, whatever it is doing, once the pool's process is gone."""
    os.read(lifeline, 1)
    os._exit(1)


def serve(calls: Connection, answer: Callable[[Call], Answer]) -> None:
    """Answer calls until the pool closes the pipe."""
    while True:
        try:
            message = calls.recv_bytes()
        except EOFError:
            return
        # Plain pickle copies tensors into the message; multiprocessing's own pickler would pass shared memory.
        calls.send_bytes(pickle.dumps(answer(pickle.loads(message))))


def main(calls: int, lifeline: int, stacks: str) -> None:
    """Serve one pool until it closes."""
    with Path(stacks).open("w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        threading.Thread(target=follow, args=(lifeline,), name="lifeline", daemon=True).start()

        import torch

        torch.set_num_threads(1)
        modules = Modules()
        serve(Connection(calls), lambda call: run(call, modules))
        faulthandler.disable()


if __name__ == "__main__":
    # Named so, and not __main__, the classes are those that the pool pickles.
    from powertrain.testing import worker

    worker.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
