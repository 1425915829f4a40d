"""The communicator over torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from powertrain.errors import ShardingError
from powertrain.mesh import DIMENSIONS, WORLD, Mesh
from powertrain.roles.communicator import Collective, Communicator, Done, Handle, Handles
from powertrain_comm.failures import explain
from powertrain_comm.measure import Chooser
from powertrain_comm.operations import START, START_TOGETHER, Group
from powertrain_comm.pairwise import Pairwise, fit
from powertrain_comm.rendezvous import join

if TYPE_CHECKING:
    from powertrain.environment import Rank
    from powertrain_comm.algorithms import Setting


class TorchHandle:
    """Collectives that torch has started.

    Args:
        work: torch's own handle.
        collectives: what it carries out.
        divide: outputs to divide, and by what, once they are complete (a mean without library support).
        rank: this process's global rank, for error messages.
    """

    def __init__(
        self, work: dist.Work, collectives: Sequence[Collective], divide: tuple[list[torch.Tensor], int], rank: int
    ) -> None:
        self._work: dist.Work | None = work
        self._collectives = tuple(collectives)
        self._divide = divide
        self._rank = rank
        self._passed: torch.Event | None = None

    def wait(self) -> None:
        """Return when the result may be read and the inputs reused.

        On a device with queues, that is in the order of the current queue.

        Raises:
            PeerFailed: the connection to another rank broke.
            CollectiveStalled: it did not finish within the timeout.
            CommunicationError: the library failed.
        """
        work = self._work
        if work is None:
            return
        try:
            work.wait()
        except RuntimeError as error:
            raise explain(error, self._collectives[0], self._rank) from error
        outputs, count = self._divide
        for output in outputs:
            output.div_(count)
        device = next((t.device for c in self._collectives for t in (c.output, c.input) if t is not None), None)
        if device is not None and device.type != "cpu":
            # The host runs ahead of the device: only an event can tell when the collective is over.
            self._passed = torch.Event(device)
            self._passed.record()
        self._collectives = self._collectives[:1]
        self._work = None  # it keeps tensors alive

    def done(self) -> bool:
        """Return whether ``wait`` would return at once, and the device has come that far."""
        work = self._work
        if work is not None:
            return bool(work.is_completed())
        return self._passed is None or bool(self._passed.query())


class TorchCommunicator(Communicator):
    """Ranks connected by torch.distributed, with one process group per mesh dimension.

    Args:
        backend: gloo, nccl, mpi or another backend of torch.
        device: where this rank's tensors live.
        mesh: the ranks' arrangement.
        rank: where they meet.
        timeout: seconds until torch itself gives a collective up.

    Raises:
        LaunchError: the ranks could not meet.
    """

    def __init__(self, backend: str, device: torch.device, mesh: Mesh, rank: Rank, timeout: float) -> None:
        self.mesh = mesh
        self.device = device
        self.backend = backend
        self._lease, fresh = join(backend, rank, timeout)
        self._pairwise = Pairwise(mesh.rank)
        self._made: list[dist.ProcessGroup] = []
        self._timeout = timedelta(seconds=timeout)
        self._groups = self._make_groups(reuse_world=fresh)
        self._needed: Callable[[str], bool] | None = None
        self._chooser: Chooser | None = None
        self._open = True
        self._failed = False

    def choose_algorithms(
        self, setting: Setting, rank: Rank, needed: Callable[[str], bool] = lambda dimension: True
    ) -> None:
        """Choose the algorithms of all groups, and of those that ``split`` will make; all ranks come here together.

        Args:
            setting: what ``[comm] algorithms`` says.
            rank: this process's place in the launch.
            needed: whether anything large goes along a dimension; all ranks find the same.

        Raises:
            CommunicationError: a rank is gone.
        """
        whole = self._groups[WORLD]
        if whole is None or len(whole.ranks) == 1 or not whole.pairwise:
            return
        self._needed, self._chooser = needed, Chooser(setting, rank, whole, self._pairwise)
        try:
            self._choose(list(self._groups))
        except BaseException as error:
            self.report(error)
            self.close()
            raise

    def _choose(self, dimensions: Sequence[str]) -> None:
        if self._chooser is None or self._needed is None:
            return
        groups = [self._groups[name] for name in dimensions if self._needed(name)]
        try:
            self._chooser.choose([group for group in groups if group is not None])
        except RuntimeError as error:
            raise explain(
                error, Collective(operation="barrier", dimension=WORLD, label="choice of algorithms"), self.rank
            ) from error

    def _make_groups(self, *, reuse_world: bool) -> dict[str, Group | None]:
        """Make the groups of every dimension, in one order on all ranks; a dimension of one has none."""
        everyone = self.mesh.peers(WORLD)
        world = dist.group.WORLD if reuse_world else self._new_group(everyone)
        assert world is not None
        groups: dict[str, Group | None] = {WORLD: Group(world, everyone, self.backend, self.device, self.rank)}
        for dimension in DIMENSIONS:
            groups[dimension] = self._connect(dimension, groups[WORLD])
        return groups

    def _connect(self, dimension: str, whole: Group | None) -> Group | None:
        """Return the group along ``dimension``, which is ``whole`` where it joins as many ranks; None for one rank."""
        mine = self.mesh.peers(dimension)
        if len(mine) == 1:
            return None
        if whole is not None and len(mine) == len(whole.ranks):
            return whole
        made = {ranks: self._new_group(ranks) for ranks in self.mesh.groups(dimension)}
        return Group(made[mine], mine, self.backend, self.device, self.rank)

    def _new_group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=self._timeout, backend=self.backend)
        if self.rank in ranks:
            self._made.append(group)
        return group

    def _group(self, dimension: str) -> Group | None:
        try:
            return self._groups[dimension]
        except KeyError:
            self.mesh.size(dimension)  # a name that means nothing is refused here
            raise ShardingError(
                f"the ranks along {dimension!r} are not connected",
                remedy="call `split` with the dimension and the size, on every rank, before the first collective",
            ) from None

    def split(self, dimension: str, size: int) -> tuple[str, str]:
        """Cut ``dimension`` into groups of ``size`` neighbours and connect them; all ranks come here together.

        Raises:
            ShardingError: the groups do not come out even, or ``dimension`` is itself cut and not connected.
            CommunicationError: torch could not connect them.
        """
        names = self.mesh.split(dimension, size)
        whole = self._group(dimension)
        fresh = [name for name in names if name not in self._groups]
        unmeasured = []
        for name in fresh:
            try:
                # A connection of its own even among all the ranks: who asks for one may wait in an order of its own.
                group = self._groups[name] = self._connect(name, None)
            except RuntimeError as error:
                raise explain(
                    error, Collective(operation="barrier", dimension=name, label="split"), self.rank
                ) from error
            if group is not None and whole is not None and group.ranks == whole.ranks:
                group.table = whole.table
            else:
                unmeasured.append(name)
        self._choose(unmeasured)
        return names

    def issue(self, collective: Collective) -> Handle:
        """Start one collective.

        Raises:
            CommunicationError: torch refused it, or the connection is broken.
            ValueError: it lacks a tensor, or takes the mean of integers.
        """
        group = self._group(collective.dimension)
        if group is None:
            return _alone(collective)
        _check(collective)
        try:
            if self._pairwise.serves(collective, group):
                return self._pairwise.start(collective, group)
            if group.pairwise and collective.operation in ("all_gather", "reduce_scatter"):
                fit(collective, group)  # so that both algorithms refuse the same, in the same words
            work = START[collective.operation](collective, group)
        except RuntimeError as error:
            raise explain(error, collective, self.rank) from error
        return self._handle(work, [collective], group)

    def issue_together(self, collectives: Sequence[Collective]) -> Handle:
        """Start several collectives; those of one kind, dimension, reduction and dtype as one, where that is faster."""
        batches: dict[object, list[Collective]] = {}
        for number, collective in enumerate(collectives):
            group = self._group(collective.dimension)
            joins = collective.operation in START_TOGETHER and (
                group is not None and not self._pairwise.serves(collective, group)
            )
            dtype = None if collective.output is None else collective.output.dtype
            key = (collective.operation, collective.dimension, collective.reduction, dtype) if joins else number
            batches.setdefault(key, []).append(collective)
        handles = [self.issue(batch[0]) if len(batch) == 1 else self._together(batch) for batch in batches.values()]
        return handles[0] if len(handles) == 1 else Handles(handles)

    def _together(self, batch: Sequence[Collective]) -> Handle:
        first = batch[0]
        group = self._group(first.dimension)
        assert group is not None
        for collective in batch:
            _check(collective)
        try:
            work = START_TOGETHER[first.operation](batch, group)
        except RuntimeError as error:
            raise explain(error, first, self.rank) from error
        return self._handle(work, batch, group)

    def _handle(self, work: dist.Work | None, batch: Sequence[Collective], group: Group) -> Handle:
        if work is None:
            return Done()
        averaging = batch[0].reduction == "mean" and not group.averages
        outputs = [part.output for part in batch if part.output is not None] if averaging else []
        return TorchHandle(work, batch, (outputs, len(group.ranks)), self.rank)

    def report(self, error: BaseException) -> None:
        """Remember the failure: ``close`` then waits for nobody."""
        self._failed = True

    def describe(self) -> dict[str, str]:
        """Return the library, its version and the groups."""
        sizes = {name: len(group.ranks) for name, group in self._groups.items() if group is not None}
        facts = {
            "library": f"torch.distributed ({self.backend})",
            "torch": torch.__version__,
            "groups": ", ".join(f"{name} {size}" for name, size in sizes.items()),
        }
        if self._chooser is not None:
            tables = {name: group.table.describe() for name, group in self._groups.items() if group is not None}
            facts |= {f"algorithms, {name}": text for name, text in tables.items()}
        if self.backend == "nccl":
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        return facts

    def close(self) -> None:
        """Destroy this communicator's groups; closing twice does nothing."""
        if not self._open:
            return
        self._open = False
        self._groups.clear()
        self._pairwise.close()
        while self._made:
            dist.destroy_process_group(self._made.pop())
        self._lease.release(peacefully=not self._failed)


def _check(collective: Collective) -> None:
    output = collective.output
    if collective.reduction == "mean" and output is not None and not output.is_floating_point():
        raise ValueError(f"{collective.operation} cannot take the mean of {output.dtype}; reduce by sum and divide")


def _alone(collective: Collective) -> Handle:
    """Carry a collective out along a dimension of one rank: a copy at most."""
    if collective.operation in ("send", "receive"):
        raise ValueError(f"there is nobody to {collective.operation} along {collective.dimension!r}: it has one rank")
    given, taken = collective.input, collective.output
    if given is not None and taken is not None and given is not taken:
        taken.copy_(given.view_as(taken))
    return Done()
