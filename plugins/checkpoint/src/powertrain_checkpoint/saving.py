"""One save on one rank: write the shard, tell the coordinator, learn how it ended.

No collective is used, so that a save can run beside training. The ranks speak
through small files in the directory that they write into, which all of them
see: ``rank-00001.done`` and ``rank-00001.failed`` from each, and from rank 0,
the coordinator, either the commit, which makes the directory vanish from its
old name, or ``failed``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

import powertrain
from powertrain.errors import CheckpointWriteFailed, PowertrainError
from powertrain_checkpoint import shard
from powertrain_checkpoint.directory import Workplace
from powertrain_checkpoint.image import Entry
from powertrain_checkpoint.manifest import FILE_NAME, Chunk, File, Manifest, Tensor
from powertrain_checkpoint.planning import Plan
from powertrain_checkpoint.shard import Content

_log = logging.getLogger("powertrain.checkpoint")

_VERDICT = "failed"


class Patience:
    """How long saves wait for a sign of the other ranks; it may be cut short while one waits.

    Args:
        seconds: without any sign of progress, after which the others are taken for dead.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._cut = -math.inf

    def cut(self, seconds: float) -> None:
        """Wait at most ``seconds`` from now on: this process ends, and others may have ended already."""
        self.seconds, self._cut = min(self.seconds, seconds), time.monotonic()

    def ended(self, since: float) -> bool:
        """Return whether silence since ``since`` (of ``time.monotonic``) has lasted too long."""
        return time.monotonic() - max(since, self._cut) > self.seconds


@attrs.frozen(kw_only=True)
class Save:
    """A save that has been planned.

    Attributes:
        workplace: where the ranks write.
        target: what it becomes.
        plan: who writes what.
        rank: this rank.
        created: when it began, later than every other checkpoint here.
        values: JSON that all ranks share.
        rank_values: JSON of this rank.
        patience: how long to wait for the others.
    """

    workplace: Workplace
    target: Path
    plan: Plan
    rank: int
    created: float
    values: Mapping[str, Any]
    rank_values: Mapping[str, Any]
    patience: Patience

    @property
    def nbytes(self) -> int:
        """The bytes of tensors that this rank writes."""
        return sum(piece.entry.nbytes for piece in self.plan.pieces[self.rank])

    @property
    def entries(self) -> list[Entry]:
        """What this rank writes, in the order of its file."""
        return [piece.entry for piece in self.plan.pieces[self.rank]]

    @property
    def path(self) -> Path:
        """The file that this rank writes."""
        return self.workplace.path / _shard_name(self.rank)

    def run(self, content: Content) -> None:
        """Write this rank's chunks, then see the save through.

        Raises:
            CheckpointWriteFailed: here or on another rank.
        """
        begin = time.monotonic()
        try:
            record = self._write(content)
            if self.rank == 0:
                self._commit(record)
            else:
                self._await_verdict()
        except Exception as error:
            raise self.abandon(error) from error
        self.workplace.release()
        seconds = time.monotonic() - begin
        if seconds > 2:
            _log.info("saved %s: %.2f GB at %.2f GB/s", self.target, self.nbytes / 1e9, self.nbytes / 1e9 / seconds)

    def abandon(self, error: Exception) -> CheckpointWriteFailed:
        """Free the space and tell the others; return the error to raise."""
        failure = error if isinstance(error, CheckpointWriteFailed) else self._explain(error)
        fields = {name: getattr(failure, name) for name in ("message", "where", "expected", "found", "remedy")}
        # The disk may refuse this too; then the others give up when their patience ends.
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            self._leave(_VERDICT if self.rank == 0 else _failed_name(self.rank), fields)
        self.workplace.release()
        return failure

    def _write(self, content: Content) -> dict[str, Any]:
        written = shard.write(self.path, self.entries, content)
        record = {**attrs.asdict(written), "values": self.rank_values}
        if self.rank:
            self._leave(_done_name(self.rank), record)
        return record

    # --- the coordinator ---------------------------------------------------------

    def _commit(self, own: dict[str, Any]) -> None:
        records = [own]
        for rank in range(1, len(self.plan.pieces)):
            done, failed = (self.workplace.path / name for name in (_done_name(rank), _failed_name(rank)))
            self._await([done, failed], f"rank {rank}")
            if failed.exists():
                raise CheckpointWriteFailed(**json.loads(failed.read_bytes()))
            records.append(json.loads(done.read_bytes()))
        self.workplace.commit(self.target, self._manifest(records))

    def _manifest(self, records: list[dict[str, Any]]) -> Manifest:
        chunks: dict[str, list[Chunk]] = {name: [] for name in self.plan.tensors}
        for index, (pieces, record) in enumerate(zip(self.plan.pieces, records, strict=True)):
            start = record["header_size"]
            for piece, checksums in zip(pieces, record["checksums"], strict=True):
                chunks[piece.name].append(Chunk(piece.offsets, piece.sizes, index, start, tuple(checksums)))
                start += piece.entry.nbytes
        return Manifest(
            tag=self.target.name,
            identity=self.workplace.identity,
            created=self.created,
            version=powertrain.__version__,
            world_size=len(records),
            files=tuple(
                File(_shard_name(rank), record["size"], record["header_size"], record["header_checksum"])
                for rank, record in enumerate(records)
            ),
            tensors={
                name: Tensor(shape, dtype, tuple(sorted(chunks[name], key=lambda chunk: chunk.offsets)))
                for name, (shape, dtype) in self.plan.tensors.items()
            },
            values=self.values,
            rank_values=tuple(record["values"] for record in records),
        )

    # --- the other ranks -----------------------------------------------------------

    def _await_verdict(self) -> None:
        verdict = self.workplace.path / _VERDICT
        self._await([verdict], "rank 0")
        if verdict.exists():
            raise CheckpointWriteFailed(**json.loads(verdict.read_bytes()))
        if not (self.target / FILE_NAME).exists():
            raise CheckpointWriteFailed(
                f"checkpoint {self.target.name} vanished while it was written", where=str(self.workplace.path)
            )

    # --- both ------------------------------------------------------------------------

    def _await(self, signs: Sequence[Path], whom: str) -> None:
        """Wait until one of ``signs`` is there or the directory is gone, as long as anything moves in it.

        Only rank 0 looks at what all ranks write, and passes it on by touching the
        directory: with thousands of ranks, listings by all would choke a file system.
        """
        begin = time.monotonic()
        seen, since = self._progress(), begin
        while not any(sign.exists() for sign in signs) and self.workplace.path.exists():
            # A tenth of the time waited so far: a long save is asked about rarely, a short one ends soon.
            time.sleep(min(max((time.monotonic() - begin) / 10, 0.002), 1.0))
            if (progress := self._progress()) != seen:
                seen, since = progress, time.monotonic()
                if self.rank == 0:
                    with contextlib.suppress(OSError):
                        os.utime(self.workplace.path)
            elif self.patience.ended(since):
                raise CheckpointWriteFailed(
                    f"nothing was heard from {whom} for {self.patience.seconds:.0f} s "
                    f"while {self.target.name} was saved",
                    where=str(self.workplace.path),
                    remedy="all ranks must see the same directory; see whether that rank is alive",
                )

    def _progress(self) -> tuple[int, ...]:
        """Return numbers that change as the save goes on; for rank 0 as anybody's part does.

        A file has its final size from the start, where space is set aside; then the time of its last change tells.
        """
        with contextlib.suppress(FileNotFoundError):
            if self.rank == 0:
                found = [path.stat() for path in self.workplace.path.iterdir()]
                latest = max((stat.st_mtime_ns for stat in found), default=0)
                return len(found), sum(stat.st_size for stat in found), latest
            first = (self.workplace.path / _shard_name(0)).stat()
            return self.workplace.path.stat().st_mtime_ns, first.st_size, first.st_mtime_ns
        return ()

    def _explain(self, error: Exception) -> CheckpointWriteFailed:
        where, reason = str(self.path), f"{type(error).__name__}: {error}"
        expected, remedy = f"room for {self.nbytes:,} bytes from this rank", None
        try:
            found = f"{shutil.disk_usage(self.target.parent).free:,} bytes free"
        except OSError:
            found = "the free space cannot be read"
        if isinstance(error, OSError):
            where, reason = str(error.filename or where), error.strerror or str(error)
        elif isinstance(error, PowertrainError):
            where, reason, remedy = error.where or where, error.message, error.remedy
            expected = error.expected or expected
            found = f"{error.found}; {found}" if error.found else found
        return CheckpointWriteFailed(
            f"checkpoint {self.target.name} was not saved: rank {self.rank}: {reason}",
            where=where,
            expected=expected,
            found=found,
            remedy=remedy,
        )

    def _leave(self, name: str, content: dict[str, Any]) -> None:
        path = self.workplace.path / name
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(content))
        draft.replace(path)


def _shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _done_name(rank: int) -> str:
    return f"rank-{rank:05d}.done"


def _failed_name(rank: int) -> str:
    return f"rank-{rank:05d}.failed"
