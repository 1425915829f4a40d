"""A pool of processes that serve as ranks, started once and not once per test.

::

    def exchange(offset):
        communicator = ...
        return communicator.rank + offset


    def test_ranks_differ(ranks):
        assert ranks(2, exchange, 10) == [10, 11]

Each call sees the launcher's variables (``RANK``, ``WORLD_SIZE``,
``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``), the
caller's working directory and import path, and random generators seeded with
0. The function is found by its source file and name, so it must stand at the
top level of a module or class; so must functions and classes among the
arguments. Arguments and results are pickled. A function that leaves a thread
or a process group behind has failed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

from powertrain.testing.ports import free_port
from powertrain.testing.worker import Answer, Call

TIMEOUT = 60.0
"""Seconds that a call may take."""

GRACE = 10.0
"""Seconds that the other ranks may take once one has failed."""

OUTPUT = 4000
"""Characters of a failed rank's output that are shown."""


class RanksFailed(Exception):
    """A function failed on at least one rank.

    Attributes:
        reports: what happened, by rank: a traceback, a stack, an exit code.
        errors: the exceptions, by rank, as far as they could be pickled.
        hung: the ranks that had to be killed.
    """

    def __init__(self, function: str, reports: Mapping[int, str], errors: Mapping[int, BaseException], hung: set[int]):
        self.function = function
        self.reports = dict(sorted(reports.items()))
        self.errors = dict(errors)
        self.hung = hung
        shown = "\n".join(f"--- rank {rank}: {report.rstrip()}" for rank, report in self.reports.items())
        super().__init__(f"{function} failed on rank {', '.join(map(str, self.reports))}\n{shown}")


class Worker:
    """One process of the pool, seen from outside."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.calls, theirs = Pipe()
        lifeline, self._lifeline = os.pipe()
        self._stacks = directory / "stacks"
        self._output = directory / "output"
        self._shown = 0
        ends = (theirs.fileno(), lifeline)
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "powertrain.testing.worker", *map(str, ends), str(self._stacks)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=ends,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        theirs.close()
        os.close(lifeline)

    def send(self, call: Call) -> None:
        """Start a call; its output begins here."""
        self._shown = self._output.stat().st_size
        self.calls.send_bytes(pickle.dumps(call))

    def receive(self) -> Answer:
        """Return the call's answer.

        Raises:
            EOFError: the process has died.
        """
        answer: Answer = pickle.loads(self.calls.recv_bytes())
        return answer

    def output(self) -> str:
        """Return what the process printed since the call began."""
        text = self._output.read_bytes()[self._shown :].decode(errors="replace")
        return f"\nits output:\n{text[-OUTPUT:]}" if text.strip() else ""

    def stacks(self) -> str:
        """Return the stacks of all threads, as far as the process can still tell."""
        before = self._stacks.stat().st_size if self._stacks.exists() else 0
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
        size, deadline = before, time.monotonic() + 2.0
        while time.monotonic() < deadline:
            time.sleep(0.05)
            last, size = size, self._stacks.stat().st_size if self._stacks.exists() else 0
            if size == last > before:
                break
        return self._stacks.read_text()[before:] if size else "no stack could be had"

    def death(self) -> str:
        """Return how the process ended, once its pipe has closed."""
        code = self.process.wait()
        stacks = self._stacks.read_text() if self._stacks.exists() else ""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return f"the process {how}\n{stacks}"

    def close(self) -> None:
        """Kill the process and remove its files; an idle one has nothing to lose."""
        self.process.kill()
        self.process.wait()
        self.calls.close()
        os.close(self._lifeline)
        shutil.rmtree(self._directory, ignore_errors=True)


class RankPool:
    """Processes that run functions as ranks of a world.

    Args:
        limit: the most ranks that a call may have.
    """

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._workers: list[Worker] = []

    def __call__(self, n: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Run ``function(*args, **kwargs)`` on ``n`` ranks; return their results, by rank.

        Raises:
            RanksFailed: it raised, died, hung or left something behind on a rank.
        """
        return self.run(n, function, args, kwargs)

    def run(
        self,
        n: int,
        function: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """As a call of the pool, with at most ``timeout`` seconds for it."""
        if not 1 <= n <= self._limit:
            raise ValueError(f"{n} ranks asked of a pool of at most {self._limit}")
        calls = _calls(n, function, tuple(args), dict(kwargs or {}))
        while len(self._workers) < n:
            self._workers.append(Worker(Path(tempfile.mkdtemp(prefix="powertrain-rank-"))))
        workers = self._workers[:n]
        try:
            for worker, call in zip(workers, calls, strict=True):
                worker.send(call)
            answers, reports = self._collect(workers, timeout)
        except BaseException:
            self._drop(workers)  # interrupted: they may be anywhere in the function
            raise
        hung = {rank for rank in range(n) if rank not in answers}
        self._drop([worker for rank, worker in enumerate(workers) if rank in hung or answers[rank].leaks])
        if reports:
            raise RanksFailed(function.__qualname__, reports, _errors(answers), hung)
        return [pickle.loads(answers[rank].result or b"") for rank in range(n)]

    def close(self) -> None:
        """End all processes."""
        self._drop(list(self._workers))

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _collect(self, workers: Sequence[Worker], timeout: float) -> tuple[dict[int, Answer], dict[int, str]]:
        """Wait for all ranks; return the answers there are, and what went wrong where."""
        deadline = time.monotonic() + timeout
        waiting = {worker.calls: rank for rank, worker in enumerate(workers)}
        answers: dict[int, Answer] = {}
        reports: dict[int, str] = {}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                worker = workers[rank]
                try:
                    answer = worker.receive()
                except (EOFError, ConnectionError):
                    reports[rank] = worker.death() + worker.output()
                else:
                    answers[rank] = answer
                    if answer.traceback is not None:
                        reports[rank] = f"raised\n{answer.traceback}{worker.output()}"
                    elif answer.leaks:
                        reports[rank] = "returned, but " + ", and ".join(answer.leaks)
                if rank in reports:
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank in waiting.values():
            worker = workers[rank]
            reports[rank] = f"still running when time was up, killed at\n{worker.stacks()}{worker.output()}"
        return answers, reports

    def _drop(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            self._workers.remove(worker)
            worker.close()


def _errors(answers: Mapping[int, Answer]) -> dict[int, BaseException]:
    found = {}
    for rank, answer in answers.items():
        with contextlib.suppress(Exception):  # many exceptions cannot be rebuilt from their pickles
            if answer.error is not None:
                found[rank] = pickle.loads(answer.error)
    return found


def _calls(n: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    """Return each rank's call."""
    qualname = function.__qualname__
    if "<" in qualname:
        raise ValueError(f"{qualname} is a local function; ranks run those at the top level of a module")
    port = free_port()
    return [
        Call(
            modules=_modules([function, *args, *kwargs.values()]),
            qualname=qualname,
            arguments=pickle.dumps((args, kwargs)),
            variables={
                "RANK": str(rank),
                "WORLD_SIZE": str(n),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(n),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            directory=str(Path.cwd()),
            path=list(sys.path),
        )
        for rank in range(n)
    ]


def _modules(values: Sequence[Any]) -> tuple[tuple[str, str], ...]:
    """Return name and file of the modules that define ``values`` or their classes, in order."""
    found: dict[str, str] = {}
    for value in values:
        for definition in (value, type(value)):
            name = getattr(definition, "__module__", None)
            file = getattr(sys.modules.get(name or ""), "__file__", None)
            if name and file:
                found[name] = file
    return tuple(found.items())
