"""The wrapper that records every collective and asks the guard why one failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from powertrain.errors import CollectiveDiverged, CommunicationError
from powertrain.roles.communicator import Collective, Communicator, Handle, WrappedCommunicator
from powertrain_comm.watchdog.blackbox import BlackBox
from powertrain_comm.watchdog.board import open_boards
from powertrain_comm.watchdog.check import CrossCheck
from powertrain_comm.watchdog.guard import Guard
from powertrain_comm.watchdog.hook import ExceptHook
from powertrain_comm.watchdog.records import Ledger, Record


class WatchedHandle:
    """A handle whose failure is explained by the other ranks."""

    __slots__ = ("_explain", "_inner", "_records")

    def __init__(
        self, inner: Handle, records: Sequence[Record], explain: Callable[[CommunicationError], CommunicationError]
    ) -> None:
        self._inner = inner
        self._records = records
        self._explain = explain

    def wait(self) -> None:
        """Return when the result may be read and the inputs reused.

        Raises:
            PeerFailed: another rank raised, died or left.
            CollectiveDiverged: the ranks issued different collectives.
            CommunicationError: it failed for another reason.
        """
        for record in self._records:
            record.expect()
        try:
            self._inner.wait()
        except CommunicationError as error:
            for record in self._records:
                record.finished, record.handle = False, None  # what failed is what this rank was doing
            raise self._explain(error) from None
        if self._inner.done():
            for record in self._records:
                record.finished, record.handle = True, None

    def done(self) -> bool:
        """Return whether ``wait`` would return at once."""
        return self._inner.done()


class WatchedCommunicator(WrappedCommunicator):
    """Watches the collectives of another communicator.

    Args:
        inner: what carries them out.
        timeout: seconds that one may take.
        cross_check: compare each one between its ranks before it starts.
    """

    def __init__(self, inner: Communicator, timeout: float, *, cross_check: bool = False) -> None:
        super().__init__(inner)
        self._ledger = Ledger()
        self._box = BlackBox()
        desk, board, boxes = open_boards(inner, timeout, str(self._box.path))
        self._cuts: set[tuple[str, int]] = set()
        self._check = CrossCheck(desk, self.mesh) if cross_check else None
        self._guard = Guard(self._ledger, board, desk, self.mesh, timeout, self._box, boxes)
        self._hook = ExceptHook(self._guard.report)

    def split(self, dimension: str, size: int) -> tuple[str, str]:
        """Cut a dimension of the wrapped communicator, once all ranks are known to do the same.

        Connecting groups is the one thing that ranks do together and that is no collective. The exchange
        before it is one: a rank that does not come, or that cuts otherwise, is found.

        Raises:
            ShardingError: the groups do not come out even.
            CollectiveDiverged: another rank cuts another dimension, or into other groups.
            CommunicationError: the groups could not be connected.
        """
        self.mesh.split(dimension, size)
        if (dimension, size) not in self._cuts:
            cuts = self.gather_json([dimension, size], label=f"split of {dimension!r}")
            if any(cut != cuts[0] for cut in cuts):
                raise CollectiveDiverged(
                    "ranks cut the mesh differently",
                    expected="split with the same arguments on every rank",
                    found="; ".join(f"rank {rank}: {cut[0]!r} by {cut[1]}" for rank, cut in enumerate(cuts)),
                )
            self._cuts.add((dimension, size))
        return self.inner.split(dimension, size)

    def issue(self, collective: Collective) -> Handle:
        """Record one collective and start it.

        Raises:
            CollectiveDiverged: another rank issued a different one (with ``cross_check``).
            PeerFailed: another rank raised, died or left.
            CommunicationError: it could not be started.
        """
        record = self._ledger.begin(collective)
        self._box.write(record)
        return self._start([record], [collective])

    def issue_together(self, collectives: Sequence[Collective]) -> Handle:
        """Record several collectives and start them; raises as ``issue`` does."""
        records = [self._ledger.begin(collective) for collective in collectives]
        for record in records:
            self._box.write(record)
        return self._start(records, collectives)

    def _start(self, records: Sequence[Record], collectives: Sequence[Collective]) -> Handle:
        if self._check is not None:
            for record in records:
                self._check.compare(record)
        try:
            inner = (
                self.inner.issue(collectives[0]) if len(collectives) == 1 else self.inner.issue_together(collectives)
            )
        except BaseException as error:
            if isinstance(error, CommunicationError):
                raise self._explained(error) from None
            for record in records:
                record.finished = True
            raise
        for record in records:
            record.pend(inner)
        return WatchedHandle(inner, records, self._explained)

    def _explained(self, error: CommunicationError) -> CommunicationError:
        """Return what the other ranks make of a failure; its text holds what the library said."""
        reason = self._guard.explain(error)
        self.inner.report(reason)
        return reason

    def report(self, error: BaseException) -> None:
        """Tell the other ranks that this one failed: they print its traceback and end."""
        self._guard.report(error)
        self.inner.report(error)

    def describe(self) -> dict[str, str]:
        """Return the wrapped communicator's facts, and that it is watched."""
        return {**self.inner.describe(), "watchdog": "on"}

    def close(self) -> None:
        """Stop watching, then close the wrapped communicator."""
        self._hook.remove()
        self._guard.close()
        self.inner.close()
