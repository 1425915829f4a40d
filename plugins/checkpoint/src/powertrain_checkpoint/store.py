"""The store: checkpoints in a directory that all ranks see."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from powertrain.errors import CheckpointError, CheckpointWriteFailed
from powertrain.mesh import WORLD
from powertrain.roles.checkpoint import CheckpointStore, Snapshot, TensorSlice
from powertrain_checkpoint import directory, library, manifest
from powertrain_checkpoint.background import Background
from powertrain_checkpoint.directory import Workplace
from powertrain_checkpoint.image import Image
from powertrain_checkpoint.manifest import Manifest
from powertrain_checkpoint.means import Means
from powertrain_checkpoint.planning import Key, Plan, describe, plan_save
from powertrain_checkpoint.reader import DirectoryReader
from powertrain_checkpoint.saving import Patience, Save
from powertrain_checkpoint.shard import check_size
from powertrain_checkpoint.staging import Staged, Staging
from powertrain_checkpoint.streaming import Streamed, write_ahead
from powertrain_checkpoint.verdict import together
from powertrain_checkpoint.weights import WeightsReader

if TYPE_CHECKING:
    from powertrain.roles.accelerator import Accelerator
    from powertrain.roles.communicator import Communicator
    from powertrain.roles.files import FileEngine

_log = logging.getLogger("powertrain.checkpoint")

_GRACE = 5.0
"""Seconds that an ending process still waits for ranks that give no sign of life."""


@attrs.frozen
class _Offer:
    """What a rank brings to a save: what it holds, a hash of that, and from rank 0 a place to write."""

    holding: list[Any]
    layout: str
    workplace: Workplace | None
    created: float


class DirectoryStore(CheckpointStore):
    """Checkpoints as directories of safetensors shards with a JSON manifest.

    Every rank writes and reads its own part, so all must see ``root``. A save
    meets the other ranks before it writes, to plan, and after, to agree on how
    it ended; what runs in the background uses no collective.

    Args:
        root: the directory; made by the first save.
        communicator: connects the ranks.
        accelerator: makes the host memory of asynchronous saves page-locked where it can.
        patience: seconds without any progress after which a save gives the other ranks up.
        make_engine: asks for the file engine, when one is first needed; where there is none, files are read and
            written by ordinary calls.
        threads: that copy and check bytes at a time.
        ranks: of this host, which share its memory; None: all.
    """

    def __init__(
        self,
        root: Path,
        communicator: Communicator,
        accelerator: Accelerator | None = None,
        *,
        patience: float = 600.0,
        make_engine: Callable[[], FileEngine | None] | None = None,
        threads: int = 2,
        ranks: int | None = None,
    ) -> None:
        self._root = root.absolute()
        self._communicator = communicator
        self._patience = Patience(patience)
        self._means = Means(make_engine, accelerator, threads, ranks or communicator.world_size)
        self._staging = Staging(self._means)
        self._background = Background()
        self._running: str | None = None  # the asynchronous save whose end is not agreed on
        self._saved: list[str] = []  # ended well, and nobody has asked
        self._planned: tuple[str, Plan] | None = None
        # A program that ends without ``close`` still gets its last checkpoint.
        self._finish = weakref.finalize(self, _end, self._background, self._patience)

    # --- saving --------------------------------------------------------------------

    def save(self, tag: str, snapshot: Snapshot, *, asynchronous: bool = False) -> None:
        """Save under ``tag``, replacing what was there at one stroke; waits for an earlier asynchronous save.

        Asynchronous: returns once what this rank writes is copied to host memory.

        Raises:
            CheckpointWriteFailed: the disk refused, here or on another rank, now or in an
                earlier asynchronous save that nobody has asked about.
            CheckpointError: the slices do not make up whole tensors, values are not JSON or differ
                between ranks, or the tag is no name; on every rank.
        """
        self._settle()
        save = self._prepare(tag, snapshot)
        pieces = _held(snapshot.tensors)
        mine = [pieces[piece.key] for piece in save.plan.pieces[save.rank]]
        if asynchronous:
            self._running = tag
            try:
                staged = self._stage(save, mine)
            except Exception as error:  # told as any failure of the background: by all ranks together
                self._background.fail(save.abandon(error))
            else:
                self._background.start(tag, lambda: save.run(staged))
        else:
            self._means.synchronize([piece.tensor for piece in mine])
            together(self._communicator, "checkpoint saved", lambda: save.run(Streamed(self._means, mine)))
            self._saved.append(tag)

    def _stage(self, save: Save, pieces: Sequence[TensorSlice]) -> Staged:
        """Copy what lies in memory; write what rests elsewhere, for there may be no memory for it, and it will change.

        The tiers serve this thread alone, so the background could not fetch it either.
        """
        image = Image(save.entries)
        resting = [part for part in image.parts(pieces) if part.piece.slot is not None]
        written = write_ahead(save.path, image, resting, self._means)
        staged = self._staging.copy(part for part in image.parts(pieces) if part.piece.slot is None)
        staged.written += written
        return staged

    def poll(self) -> list[str]:
        """Return the tags that became complete since the last call, without waiting for a save.

        While an asynchronous save is under way the ranks exchange one number, so
        that all learn in the same call that it ended, and how.

        Raises:
            CheckpointWriteFailed: an asynchronous save failed, on this rank or another.
        """
        if self._running is not None and self._ended_everywhere():
            self._settle()
        saved, self._saved = self._saved, []
        return saved

    def wait(self) -> list[str]:
        """Wait for asynchronous saves, then as ``poll``."""
        self._settle()
        return self.poll()

    def _ended_everywhere(self) -> bool:
        ended = self._background.ended()
        if self._communicator.world_size == 1:
            return ended
        number = torch.tensor([int(ended)], dtype=torch.int32, device=self._communicator.device)
        self._communicator.all_reduce(number, WORLD, reduction="min", label="checkpoint progress").wait()
        return bool(number.item())

    def _settle(self) -> None:
        """Wait for the save under way, and agree with the other ranks on how it ended."""
        if self._running is None:
            return
        self._background.join()
        tag, self._running = self._running, None
        together(self._communicator, "checkpoint saved", self._background.check)
        self._saved.append(tag)

    def close(self) -> None:
        """Wait for the save under way, as far as this rank goes.

        Raises:
            CheckpointWriteFailed: it failed, and nobody has asked about it yet.
        """
        self._background.join()
        self._staging.drop()
        self._means.close()
        self._background.check()

    def abandon(self) -> None:
        """Give up a save under way that does not end within seconds; a process without peers sees it through.

        The checkpoints that are complete stay as they are.
        """
        self._patience.cut(_GRACE)
        try:
            self._background.join(None if self._communicator.world_size == 1 else _GRACE + 1)
        except TimeoutError as error:
            _log.error("%s: it was given up", error)

    def _prepare(self, tag: str, snapshot: Snapshot) -> Save:
        """Meet the other ranks: agree on a place to write and on who writes what."""
        offer: _Offer | None = None

        def make() -> _Offer:
            nonlocal offer
            offer = self._offer(tag, snapshot)
            return offer

        try:
            same = {"tag": tag, **{f"values.{key}": value for key, value in snapshot.values.items()}}
            made, shares = together(
                self._communicator, "checkpoint start", make, lambda offer: self._share(offer, same)
            )
            _check_same(shares)
            plan = self._plan(made, all(share["known"] for share in shares))
        except BaseException:
            if offer is not None and offer.workplace is not None:
                offer.workplace.discard()
            raise
        return Save(
            workplace=made.workplace or Workplace(self._root / shares[0]["workplace"]),
            target=self._root / tag,
            plan=plan,
            rank=self._communicator.rank,
            created=made.created,
            # Copies: the caller may change its dictionaries while the background writes.
            values=json.loads(json.dumps(snapshot.values)),
            rank_values=json.loads(json.dumps(snapshot.rank_values)),
            patience=self._patience,
        )

    def _offer(self, tag: str, snapshot: Snapshot) -> _Offer:
        directory.check_tag(tag)
        self._get_ready()
        _check_json("values", snapshot.values)
        _check_json("rank_values", snapshot.rank_values)
        holding = describe(snapshot.tensors)
        layout = hashlib.sha256(json.dumps(holding).encode()).hexdigest()
        if self._communicator.rank:
            return _Offer(holding, layout, None, 0.0)
        try:
            directory.sweep(self._root)
            created = max(time.time(), directory.latest(self._root) + 1e-3)
            return _Offer(holding, layout, Workplace.make(self._root, tag), created)
        except OSError as error:
            raise CheckpointWriteFailed(
                f"checkpoint {tag} was not saved: {error.strerror or error}", where=error.filename or str(self._root)
            ) from error

    def _get_ready(self) -> None:
        if not self._means.ready and self._means.engine:
            # What ends with the process ends in reverse order: the last save before the engine that it needs.
            self._finish.detach()
            self._finish = weakref.finalize(self, _end, self._background, self._patience)

    def _share(self, offer: _Offer, same: Mapping[str, Any]) -> dict[str, Any]:
        known = self._planned is not None and self._planned[0] == offer.layout
        hashes = {key: hashlib.sha256(_text(value)).hexdigest()[:16] for key, value in same.items()}
        return {"known": known, "workplace": offer.workplace.path.name if offer.workplace else None, "same": hashes}

    def _plan(self, offer: _Offer, known: bool) -> Plan:
        """Return the plan of the last save if no rank's layout has changed, or make one with the others."""
        if known and self._planned is not None:
            return self._planned[1]
        # Every rank makes the same plan from the same holdings, and raises alike.
        plan = plan_save(self._communicator.gather_json(offer.holding, label="checkpoint plan"))
        self._planned = offer.layout, plan
        return plan

    # --- reading ---------------------------------------------------------------------

    def tags(self) -> list[str]:
        """Return the tags of complete checkpoints, oldest first, as rank 0 sees them."""
        return list(self._first("checkpoint tags", lambda: directory.complete(self._root)))

    def open(self, tag: str | None = None) -> DirectoryReader:
        """Open ``tag``, or the newest complete checkpoint, once a save under way has ended.

        Checks that every file is there and whole; their bytes are verified as they are read.

        Raises:
            CheckpointMissing: there is none.
            ManifestMissing, ShardMissing, ShardTruncated, ShardCorrupt: it is damaged; on every rank.
        """
        self._background.join()
        path = self._root / self._first("checkpoint choice", lambda: directory.choose(self._root, tag))
        found, identities = together(
            self._communicator, "checkpoint open", lambda: self._load(path), lambda found: found.identity
        )
        if len(set(identities)) > 1:
            raise CheckpointError(
                f"ranks see different checkpoints as {path.name}",
                where=str(path),
                remedy="all ranks must see the same directory, and nobody may save into it meanwhile",
            )
        return DirectoryReader(path, found, self._communicator, self._means)

    def open_weights(self) -> WeightsReader:
        """Open the directory, or file, as safetensors that a model library wrote.

        Each rank looks at all headers; what is read later is local.

        Raises:
            CheckpointMissing: there are none.
            ShardMissing, ShardTruncated, ShardCorrupt: a file is damaged; on every rank.
            CheckpointError: the ranks see different files.
        """
        found, identities = together(
            self._communicator, "weights open", lambda: library.load(self._root), lambda found: found.identity
        )
        if len(set(identities)) > 1:
            raise CheckpointError(
                f"ranks see different weights as {self._root.name}",
                where=str(self._root),
                remedy="give every rank the same files",
            )
        return WeightsReader(found)

    def prune(self, keep: int, pattern: str = ".*") -> None:
        """Delete all but the newest ``keep`` (at least 1) of the complete checkpoints whose tag matches ``pattern``."""
        if keep < 1:
            raise ValueError(f"at least one checkpoint must be kept, not {keep}")

        def delete() -> None:
            for tag in [tag for tag in directory.complete(self._root) if re.fullmatch(pattern, tag)][:-keep]:
                directory.delete(self._root, tag)

        self._first("checkpoint prune", delete)

    def _first(self, label: str, work: Callable[[], Any]) -> Any:
        """Do something on rank 0 and return its result (JSON) on every rank."""
        first = self._communicator.rank == 0
        _, results = together(self._communicator, label, lambda: work() if first else None, lambda result: result)
        return results[0]

    def _load(self, path: Path) -> Manifest:
        self._get_ready()
        found = manifest.load(path)
        # Each rank looks at its share of the files: together, at all.
        for file in found.files[self._communicator.rank :: self._communicator.world_size]:
            check_size(path / file.name, file.size)
        return found


def _held(slices: Sequence[TensorSlice]) -> dict[Key, TensorSlice]:
    """Return the boxes of slices by their identity, each as a slice."""
    result = {}
    for item in slices:
        taken = 0
        for box, _ in item.chunks():
            result[item.name, box.offsets] = item.narrow(taken, taken + box.numel)
            taken += box.numel
    return result


def _end(background: Background, patience: Patience) -> None:
    """See a save through at the end of a program that did not close its store, and tell if it failed."""
    patience.cut(_GRACE)
    background.join()
    while True:
        try:
            background.check()
        except Exception as error:  # nobody is left to raise it to
            _log.error("%s", error)
        else:
            return


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _check_same(shares: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a save to which ranks bring different JSON where it must be the same; every rank raises alike."""
    first = shares[0]["same"]
    for rank, share in enumerate(shares):
        keys = sorted(first.keys() | share["same"].keys())
        if wrong := [key for key in keys if first.get(key) != share["same"].get(key)]:
            raise CheckpointError(
                f"ranks 0 and {rank} bring different JSON to one checkpoint",
                where=", ".join(wrong),
                expected="the same on every rank",
                remedy="give every rank the same client_state, or gather what differs before saving",
            )


def _check_json(what: str, value: Any, path: str = "") -> None:
    """Refuse what JSON would not give back as it was, naming the place."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _not_json(what, path, f"the key {key!r}")
            _check_json(what, item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(what, item, f"{path}[{index}]")
    elif not isinstance(value, str | int | float | bool | None):
        raise _not_json(what, path, f"a {type(value).__name__}")


def _not_json(what: str, path: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's {what} hold something that is not JSON",
        where=f"{what}{path}",
        expected="dictionaries with string keys, lists, strings, numbers, true, false or null",
        found=found,
        remedy="convert it before saving; tensors belong into the model or the optimizer",
    )
