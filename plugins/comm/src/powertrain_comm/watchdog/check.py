"""Compares a collective between its ranks before it starts: slow, for debugging."""

from __future__ import annotations

from powertrain.errors import CollectiveDiverged
from powertrain.mesh import Mesh
from powertrain_comm.watchdog.board import Board
from powertrain_comm.watchdog.records import Record

KEPT = 2
"""Checks whose notes may still be read by a slower rank."""


class CrossCheck:
    """Exchanges what each rank is about to issue.

    Args:
        board: where the ranks meet.
        mesh: their arrangement.
    """

    def __init__(self, board: Board, mesh: Mesh) -> None:
        self._board = board
        self._mesh = mesh

    def compare(self, record: Record) -> None:
        """Wait for all ranks along the dimension, and compare.

        Raises:
            CollectiveDiverged: another rank is about to issue something else.
        """
        kind = record.kind
        if not kind.joint:
            return
        peers = self._mesh.peers(kind.dimension)
        place = f"check/{kind.dimension}/{peers[0]}"
        facts = kind.facts()
        what = [facts[key] for key in ("operation", "dimension", "shape", "dtype", "reduction")]
        if kind.operation == "all_to_all":
            what[2] = facts["shape"][1:]  # uneven exchanges differ in length
        self._board.write(f"{place}/{record.number}/{self._mesh.rank}", [what, facts["label"], facts["site"]])
        notes = {rank: self._board.await_note(f"{place}/{record.number}/{rank}") for rank in peers}
        # Everyone has written this check, so everyone has read the one before the last.
        self._board.erase(f"{place}/{record.number - KEPT}/{self._mesh.rank}")
        if any(note[0] != what for note in notes.values()):
            told = "; ".join(f"rank {rank}: {_show(*note)}" for rank, note in notes.items())
            raise CollectiveDiverged(
                f"ranks are about to issue different collectives at #{record.number} along {kind.dimension!r}",
                where=facts["site"],
                found=told,
            )


def _show(what: list[object], label: str, site: str) -> str:
    operation, _, shape, dtype, reduction = what
    return f"{operation} {reduction} {label!r} {dtype}{shape} at {site}".replace("  ", " ")
