"""The thread that notices what the main thread, stuck in a collective, cannot."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from powertrain.errors import CommunicationError
from powertrain.mesh import WORLD, Mesh
from powertrain_comm.watchdog.blackbox import BlackBox, read
from powertrain_comm.watchdog.board import HOST, Board, BoardLost
from powertrain_comm.watchdog.diagnosis import State, find_divergence
from powertrain_comm.watchdog.records import Ledger, Record
from powertrain_comm.watchdog.termination import Termination
from powertrain_comm.watchdog.verdict import Verdict, judge, raised

TICK = 0.25
"""Seconds between two looks at the ledger and the board."""

SUSPICION = 1.0
"""Seconds that a collective takes before its ranks are compared."""

NEIGHBOURS = 8
"""Ranks with which a suspicious one is compared."""

ANSWER = 2.5
"""Seconds that the others have to answer an inquiry."""

GRACE = 1.0
"""Seconds in which a rank may raise an exception of its own before another's ends it."""

UNWINDING = 3.0
"""Seconds that the main thread has to leave once it knows why the run ends."""

DEPARTURE = 2.0
"""Seconds that a rank needs to exit once it has left the board: torch takes its time to unload."""

LINGER = 5.0
"""Seconds that a leaving rank waits, at most, for those that still need it."""

LAST_WORDS = 0.5
"""Seconds that the others wait for the reporter, and the host of the board for them."""


class Guard:
    """Watches one communicator, and ends the process when the run cannot go on.

    Ranks leave notes on a board: their last collectives, an inquiry by the
    rank that first sees trouble, the answers, and the verdict, which is
    written once. A rank that reads a verdict prints it and exits with 1.

    Args:
        ledger: the collectives of this rank.
        board: the thread's own connection.
        desk: the connection of the main thread.
        mesh: the ranks' arrangement.
        timeout: seconds that a collective may take.
        box: this rank's black box, removed at the end.
        boxes: the paths of all ranks' black boxes.
    """

    def __init__(
        self,
        ledger: Ledger,
        board: Board,
        desk: Board,
        mesh: Mesh,
        timeout: float,
        box: BlackBox,
        boxes: Sequence[str],
    ) -> None:
        self._ledger = ledger
        self._board: Board | None = board
        self._desk = desk
        self._mesh = mesh
        self._timeout = timeout
        self._box = box
        self._boxes = boxes
        self._process = os.getpid()  # a forked child inherits the hooks, but not the thread
        self._rank = mesh.rank
        self._ranks = mesh.peers(WORLD)
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._own_error = threading.Event()
        self._decided = threading.Event()
        self._trouble: CommunicationError | None = None
        self._verdict: Verdict | None = None
        self._let_go = threading.Lock()
        self._rings = 0
        self._published = -1
        self._termination = Termination()
        self._heard: Mapping[int, State] = {}
        self._thread = threading.Thread(target=self._run, name="powertrain watchdog", daemon=True)
        self._thread.start()
        # A daemon thread that is in C++ when the interpreter goes crashes the process: end it before.
        atexit.register(self.close)

    # --- the main thread's side ---------------------------------------------------

    def explain(self, error: CommunicationError) -> CommunicationError:
        """Return why the run ends, as far as the other ranks can tell, or ``error`` itself."""
        if self._stop.is_set():
            return error
        self._trouble = error
        self._wake.set()
        self._decided.wait(ANSWER + GRACE + 2 * UNWINDING)
        return error if self._verdict is None else self._verdict.error()

    def report(self, error: BaseException) -> None:
        """Tell the others that this rank failed, and wait until they know; the first report counts."""
        if self._own_error.is_set() or self._stop.is_set() or os.getpid() != self._process:
            return
        if isinstance(error, SystemExit) and not error.code:
            return  # sys.exit() is no failure
        self._own_error.set()
        with contextlib.suppress(BoardLost):
            won, _ = self._desk.first("verdict", attrs.asdict(raised(self._rank, error)))
            self._desk.count("bell", 1)
            self._release(self._desk)
            if won:
                self._desk.until(lambda: self._all_released(self._desk), LINGER)

    def close(self) -> None:
        """Stop watching; closing twice does nothing."""
        if self._stop.is_set() or os.getpid() != self._process:
            return
        self._stop.set()
        self._wake.set()
        atexit.unregister(self.close)
        self._thread.join(LINGER)
        self._termination.close()
        self._box.close()
        with contextlib.suppress(BoardLost):
            if self._board is None:
                return
            self._desk.write(f"state/{self._rank}", self._ledger.state())
            self._desk.write(f"left/{self._rank}")
            self._desk.count("bell", 1)
            self._release(self._desk)
            if self._rank == HOST:
                self._desk.until(lambda: self._all_released(self._desk), LINGER)

    def _release(self, board: Board) -> None:
        """Count this rank, once, among those that need no other rank any more."""
        if self._let_go.acquire(blocking=False):
            board.count("released", 1)

    def _all_released(self, board: Board) -> bool:
        absent = self._verdict.absent if self._verdict is not None else ()  # the dead need nothing
        return board.count("released") >= len(self._ranks) - len(absent)

    # --- the thread's side ----------------------------------------------------------

    def _run(self) -> None:
        while self._verdict is None:
            self._wake.wait(TICK)
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                self._tick()
            except BoardLost as error:
                self._host_is_gone(error)

    def _tick(self) -> None:
        board = self._board
        oldest = self._ledger.oldest()
        age = time.monotonic() - oldest.started if oldest else 0.0
        if self._trouble is None and self._termination.asked:
            self._end(oldest)
        if board is not None:
            self._look(board)
            if self._verdict is not None or self._board is None:
                return
            if self._ledger.begun != self._published:
                self._published = self._ledger.begun
                board.write(f"state/{self._rank}", self._ledger.state(NEIGHBOURS))
        if self._trouble is not None and not self._decided.is_set():
            self._inquire(None)
        elif oldest is not None and age > self._timeout:
            self._inquire(oldest, late=age > self._timeout + ANSWER + 1)
        elif oldest is not None and board is not None and age > SUSPICION and self._differs(board, oldest):
            self._inquire(None)

    def _look(self, board: Board) -> None:
        """Read what was left on the board since the last look."""
        rings = board.count("bell")
        if rings == self._rings:
            return
        self._rings = rings
        verdict = board.read("verdict")
        if verdict is not None:
            self._obey(_parse(verdict))
            return
        number = board.count("closed")
        if board.read(f"inquiry/{number}") is not None:
            board.write(f"answer/{number}/{self._rank}", self._ledger.state())
        if self._rank != HOST and board.read(f"left/{HOST}"):
            # The host goes in peace: keep what is known, and let it.
            known = self._states(board, number)
            self._heard = {r: attrs.evolve(state, answered=not state.left) for r, state in known.items()}
            self._board = None
            self._release(board)

    def _differs(self, board: Board, oldest: Record) -> bool:
        """Return whether a neighbour did something else at the same place."""
        if oldest.kind.joint:
            peers = self._mesh.peers(oldest.kind.dimension)
            start = peers.index(self._rank)
            near = [peers[(start + i) % len(peers)] for i in range(min(len(peers), NEIGHBOURS + 1))]
            notes = board.read_all("state", near)
            states = {r: State.parse(r, note, answered=False, left=False) for r, note in notes.items()}
            states[self._rank] = self._mine()
            return find_divergence(self._mesh, states) is not None
        return False

    def _inquire(self, stalled: Record | None, *, late: bool = False) -> None:
        """Ask every rank what it does, judge, and tell all."""
        board = self._board
        states = dict(self._heard)
        if board is not None:
            number = board.count("closed")
            if board.first(f"inquiry/{number}", self._rank)[0]:
                board.write(f"answer/{number}/{self._rank}", self._ledger.state())
                board.count("bell", 1)
                board.until(lambda: self._all_answered(board, number), ANSWER)
            elif not late:
                return  # another rank asks; its verdict will come
            states = self._states(board, number)
        states[self._rank] = self._mine()
        entry = states[self._rank].waiting() if stalled is not None else None
        verdict = judge(self._mesh, states, stalled=entry, rank=self._rank, timeout=self._timeout)
        if verdict is not None and self._termination.asked and all(states[r].left for r in verdict.absent):
            verdict = None if verdict.kind == "lost" else verdict  # all ranks are being ended, and some were faster
        if verdict is None:
            if board is not None:
                board.count("closed", 1)
            self._decided.set()
            return
        if board is not None:
            verdict = _parse(board.first("verdict", attrs.asdict(verdict))[1])
            board.count("bell", 1)
        self._obey(verdict)

    def _end(self, oldest: Record | None) -> None:
        """Being ended by SIGTERM, say why if another rank's end left this one in a collective, and go."""
        if oldest is not None:
            self._inquire(None)
        if self._verdict is not None or self._trouble is not None:
            return
        board = self._board
        with contextlib.suppress(BoardLost):
            if board is not None:
                board.write(f"left/{self._rank}")
                board.count("bell", 1)
                self._release(board)
                if self._rank == HOST:
                    board.until(lambda: self._all_released(board), 2 * LAST_WORDS)
        Path(self._boxes[self._rank]).unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGTERM)

    def _all_answered(self, board: Board, number: int) -> bool:
        if board.read("verdict") is not None:
            return True
        known = {**board.read_all(f"answer/{number}", self._ranks), **board.read_all("left", self._ranks)}
        return len(known) == len(self._ranks)

    def _mine(self) -> State:
        return State.parse(self._rank, self._ledger.state(), answered=True, left=False)

    def _states(self, board: Board, number: int) -> dict[int, State]:
        left = board.read_all("left", self._ranks)
        answers = board.read_all(f"answer/{number}", self._ranks)
        notes = {**board.read_all("state", self._ranks), **answers}
        return {
            r: State.parse(r, notes.get(r), answered=r in answers and r not in left, left=r in left)
            if r in answers or r in left
            else self._last_of(r, notes.get(r))
            for r in self._ranks
        }

    def _last_of(self, rank: int, note: Mapping[str, Any] | None) -> State:
        """Return what a rank that does not answer left behind."""
        return State.parse(rank, read(self._boxes[rank]) or note, answered=False, left=False)

    def _host_is_gone(self, error: BoardLost) -> None:
        """End the run: the host of the board announces itself when it leaves in peace."""
        self._board = None
        if self._stop.is_set():
            return
        states = {HOST: self._last_of(HOST, None), self._rank: self._mine()}
        verdict = judge(self._mesh, states, stalled=None, rank=self._rank, timeout=self._timeout)
        assert verdict is not None, error
        self._obey(attrs.evolve(verdict, reporter=self._rank))

    # --- the end ----------------------------------------------------------------------

    def _obey(self, verdict: Verdict) -> None:
        """Print the verdict and end the process, unless the main thread is ending it."""
        self._verdict = verdict
        raising = verdict.kind == "raised"
        board = self._board
        if self._own_error.wait(GRACE if raising and self._trouble is None else 0.0):
            with contextlib.suppress(BoardLost):
                if board is not None:
                    self._release(board)
            self._decided.set()
            return
        if raising or self._rank == verdict.reporter:
            self._say(verdict.full())
        else:
            self._after_the_reporter(verdict)
        with contextlib.suppress(BoardLost):
            if board is not None:
                board.write("printed")
                self._release(board)
                if raising:
                    # The rank that raised goes first: a launcher blames the first one to exit.
                    board.until(lambda: board.read(f"left/{verdict.rank}") is not None, UNWINDING)
                    self._wake.clear()
                    self._wake.wait(DEPARTURE)  # cut short when the main thread sees the connection close
        self._decided.set()
        if self._trouble is not None and self._stop.wait(UNWINDING):
            return
        with contextlib.suppress(BoardLost):
            if board is not None and self._rank == HOST:
                board.until(lambda: self._all_released(board), 2 * LAST_WORDS)
        for rank in {self._rank, *verdict.absent}:
            Path(self._boxes[rank]).unlink(missing_ok=True)
        if raising:
            self._say(f"rank {self._rank} ends: {verdict.message}")  # as the main thread would have, had it come to it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the main thread may be stuck in C++, where no exception reaches it

    def _after_the_reporter(self, verdict: Verdict) -> None:
        board = self._board
        with contextlib.suppress(BoardLost):
            if board is not None:
                board.until(lambda: board.read("printed") is not None, LAST_WORDS)
        self._say(f"rank {self._rank} ends, see rank {verdict.reporter}: {verdict.message}")

    def _say(self, text: str) -> None:
        sys.stderr.write(text.rstrip() + "\n")
        sys.stderr.flush()


def _parse(note: dict[str, object]) -> Verdict:
    return Verdict(**{**note, "absent": tuple(note["absent"])})  # type: ignore[arg-type]
