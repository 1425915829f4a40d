"""The update of this rank's slices: scale, norm, clip, optimizer, batch by batch.

A batch is what one call of the optimizer updates: everything, a unit, or, where state rests elsewhere
than on the device, a chunk. While one is updated the next comes and the last leaves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from powertrain.compat import has_step_hooks
from powertrain.context import Context
from powertrain.errors import PrecisionError, ShardingError
from powertrain.roles.communicator import Done, Handle
from powertrain.roles.optimizer import FlatOptimizer, Update, blocks_of, clip_factor, granularity_of
from powertrain_zero.batch import Batch, Travel
from powertrain_zero.chunk import Chunk, Segment, Tiers
from powertrain_zero.groups import Groups
from powertrain_zero.late import Late, late_units
from powertrain_zero.unit import Unit
from powertrain_zero.work import Work, run_through

_log = logging.getLogger("powertrain.zero")


class Updater:
    """Drives a torch optimizer over segments of flat shards.

    Attributes:
        travels: for each chunk that does not stay, what brings it here.
        scale: what the last update multiplied gradients by, and they were not yet.
        late: what is updated during the next forward pass.

    Args:
        units: whose segments are updated.
        optimizer: its groups are pointed at the segments, each group at those of its own
            parameters; a group that has none on this rank stays, empty.
        groups: over which ranks state is sharded.
        tiers: where it rests.
        names: of the model's parameters, in the order of registration.
        context: the run.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        optimizer: torch.optim.Optimizer,
        groups: Groups,
        tiers: Tiers,
        names: Iterable[str],
        context: Context,
    ) -> None:
        self._units = list(units)
        self._flat: FlatOptimizer | None = optimizer if isinstance(optimizer, FlatOptimizer) else None
        self._optimizer = optimizer
        self._groups = groups
        self._communicator = context.communicator
        self._state_dtype = context.recipe.state
        self._master_dtype = context.recipe.master
        if self._flat is not None and self._state_dtype != self._master_dtype:
            self._flat.state_dtype = self._state_dtype
        segments: dict[torch.nn.Parameter, list[Segment]] = {}
        self._unit_of: dict[torch.nn.Parameter, Unit] = {}
        self._outs: dict[torch.nn.Parameter, torch.Tensor] = {}  # where new values go in the model's format
        self._order = {name: number for number, name in enumerate(names)}
        self._name_of: dict[torch.nn.Parameter, str] = {}
        self._numbers: dict[torch.nn.Parameter, int] = {}  # the same for all pieces of a parameter, on all ranks
        for unit in units:
            for flat in unit.flats:
                for _, param in flat.named:
                    segments[param] = []
                for segment in flat.segments:
                    self._numbers[segment.master] = len(segments) - len(flat.named) + segment.index
                    if unit.casts(flat):
                        self._outs[segment.master] = segment.of(flat.own(flat.full))
                    segments[flat.named[segment.index][1]].append(segment)
                    self._unit_of[segment.master] = unit
                    self._name_of[segment.master] = segment.name
        self._parameters = len(segments)
        group_of = {param: group for group in optimizer.param_groups for param in group["params"]}
        for group in optimizer.param_groups:
            group["params"] = [segment.master for param in group["params"] for segment in segments[param]]
        # What the optimizer knows already (it was loaded, or fills its state when it is made) goes on from there.
        for param, parts in segments.items():
            if state := optimizer.state.pop(param, None):
                for segment in parts:
                    optimizer.state[segment.master] = {
                        key: self._share(segment, key, value, group_of.get(param, {})) for key, value in state.items()
                    }
        self._lengths = [len(group["params"]) for group in optimizer.param_groups]
        # One call a unit lets parameters travel while the next unit is updated; it is legal where
        # the update of one element depends on no other. Others than torch's own may count their calls.
        elementwise = granularity_of(optimizer) == "element"
        of_torch = self._flat is not None or type(optimizer).__module__.startswith("torch.optim.")
        travels = groups.shards > 1 and any(unit.resident for unit in units)
        self._converts = self._state_dtype != self._master_dtype and self._flat is None
        if self._converts and not elementwise:
            raise PrecisionError(
                f"the state of {type(optimizer).__name__} cannot rest in another format than the masters",
                where="precision.optimizer",
                expected="an optimizer that updates element by element, such as adamw",
                remedy="leave the key out",
            )
        self._moves = not tiers.stay
        self.travels: dict[Chunk, Travel] = {}
        self.late = Late([])
        if self._moves and not of_torch:
            raise ShardingError(
                f"{type(optimizer).__name__} updates all parameters in one call: they cannot come one after the other",
                where=f"state that rests on {tiers.optimizer.name}",
                expected="an optimizer of torch.optim, or a FlatOptimizer of a plugin (powertrain-optimizers has some)",
                remedy="choose another optimizer, or let state rest on the device",
            )
        if self._moves:
            self._batches = list(self._travelling())
            self.late = self._make_late(tiers, elementwise=elementwise)
        elif elementwise and of_torch and (travels or self._converts):
            self._batches = [Batch(self._members([unit]), units=[unit]) for unit in units]
        else:
            self._batches = [self._everything()]
        self.scale: float | torch.Tensor = 1.0
        self._work = Work(
            optimizer,
            outs=self._outs,
            total=self._total,
            converts=(self._state_dtype, self._master_dtype) if self._converts else None,
            tidy=partial(context.accelerator.release_unused, context.device),
        )

    def _make_late(self, tiers: Tiers, *, elementwise: bool) -> Late:
        """Take the batches of late units out of those that are updated at once.

        Raises:
            ShardingError: the optimizer's rule looks at more than single elements, over all ranks.
        """
        if not tiers.optimizer.late:
            return Late([])
        if not elementwise:
            raise ShardingError(
                f"the update of {type(self._optimizer).__name__} asks other ranks, which a delayed one cannot",
                where=f"state that rests on {tiers.optimizer.name}",
                expected="an optimizer that updates element by element, such as adamw",
                remedy="choose another optimizer, or leave offload.delayed out",
            )
        units = late_units(self._units, tiers.optimizer.late)
        first = next((n for n, batch in enumerate(self._batches) if batch.of in units), len(self._batches))
        late = Late(self._batches[first:])
        self._batches = self._batches[:first]
        for batch in late.batches:
            batch.hold()
        if units:
            names = units[0].name if len(units) == 1 else f"{units[0].name} … {units[-1].name}"
            _log.info(
                "delayed: %d of %d units (%s) use parameters of one step before", len(units), len(self._units), names
            )
        else:
            _log.warning("delayed: no unit is small enough to be updated late; nothing changes by it")
        return late

    def _members(self, units: Sequence[Unit]) -> list[list[torch.nn.Parameter]]:
        """Return the masters of some units, for each of the optimizer's groups."""
        groups = self._optimizer.param_groups
        return [[master for master in group["params"] if self._unit_of[master] in units] for group in groups]

    def _everything(self) -> Batch:
        return Batch([group["params"] for group in self._optimizer.param_groups], units=self._units)

    def _travelling(self) -> Iterator[Batch]:
        """Yield a batch for each chunk; with the last of a unit, the unit is complete."""
        number = {m: index for index, group in enumerate(self._optimizer.param_groups) for m in group["params"]}
        for unit in self._units:
            for part in unit.gradients if self._flat is None else ():
                part.seen = self._master_dtype
            state = self._optimizer.state
            travels = [Travel(part, chunk, state) for part in unit.gradients for chunk in part.flat.chunks]
            for travel in travels:
                members: list[list[torch.nn.Parameter]] = [[] for _ in self._optimizer.param_groups]
                for segment in travel.chunk.segments:
                    if segment.master in number:
                        members[number[segment.master]].append(segment.master)
                self.travels[travel.chunk] = travel
                yield Batch(members, [travel], [unit] if travel is travels[-1] else [], of=unit)
            if not travels:
                yield Batch([[] for _ in self._optimizer.param_groups], units=[unit], of=unit)

    def _share(self, segment: Segment, key: str, value: Any, group: Mapping[str, Any]) -> Any:
        """Return a segment's part of what the optimizer knows of a whole parameter."""
        dtype = self._state_dtype if self._flat is None else self._flat.format_of(key, segment.master)
        return segment.share(key, value, dtype, group, blocks_of(self._optimizer).get(key, 0))

    def step(
        self,
        publish: Callable[[Unit], Handle | None],
        *,
        grad_scale: float,
        clip: float | None,
        check_overflow: bool,
    ) -> Update:
        """Update all masters from their gradients, and publish each unit as it is done.

        Args:
            publish: starts bringing a unit's new values into its parameters.
            grad_scale: what the gradients were multiplied by.
            clip: the largest global norm.
            check_overflow: skip the update when the norm is not finite.
        """
        self._check_groups()
        grads = {} if self._moves else self._deliver()
        inverse = 1.0 / grad_scale
        if self._flat is None and grad_scale != 1.0:
            for grad in grads.values():
                grad.mul_(inverse)
        norm, handle = self._norm(grads)
        scaled = self._flat is None and not self._moves
        unscaled = 1.0 if scaled else inverse  # what is left to multiply by

        def grad_norm() -> torch.Tensor:
            handle.wait()
            root = norm.sqrt() if self._groups.shards > 1 else norm
            return root * unscaled if unscaled != 1.0 else root

        self.scale = unscaled
        if check_overflow and not bool(grad_norm().isfinite()):
            self._put_back()
            return Update(applied=False, grad_norm=grad_norm)
        if clip is not None and not scaled:
            self.scale = clip_factor(grad_norm(), clip) * unscaled
        elif clip is not None:
            torch.nn.utils.clip_grads_with_norm_(list(grads), clip, grad_norm())
        self._run(publish, grads, [handle])
        self._put_back()
        return Update(applied=True, grad_norm=grad_norm)

    def _run(
        self,
        publish: Callable[[Unit], Handle | None],
        grads: Mapping[torch.nn.Parameter, torch.Tensor],
        handles: list[Handle | None],
    ) -> None:
        """Let the optimizer update everything, and publish; at the end wait for that, and for ``handles``."""
        batches = self._batches
        if has_step_hooks(self._optimizer):  # who listens hears of one step, and sees what it uses
            self._check_hooks()
            # In the master's format, which has room for what is scaled; _put_back takes the copy away.
            copies = {m: grad.to(m.dtype).mul_(self.scale) for m, grad in grads.items() if grad.dtype != m.dtype}
            self.show()
            for master, grad in grads.items():
                master.grad = copies.get(master, grad)
            batches = [self._everything()]
        handles += [publish(unit) for unit in self.late.show()]
        for batch in run_through(batches, self._work, grads, self.scale):
            handles += [publish(unit) for unit in batch.units]
        for published in handles:
            if published is not None:
                published.wait()
        if self.late.batches:
            self.late.start(self._work.beside(), self.scale)

    def visit(self, action: Callable[[torch.optim.Optimizer], None]) -> None:
        """Let ``action`` see the optimizer with all that it updates, some at a time where it rests elsewhere."""
        if not self._moves:
            action(self._optimizer)
            return
        self.late.join()
        for batch in [*self._batches, *self.late.batches]:
            self._work.visit(batch, action)

    def _check_hooks(self) -> None:
        """Refuse hooks that want to see all of what comes piece by piece.

        Raises:
            ShardingError: they do.
        """
        if self._moves:
            raise ShardingError(
                "hooks on the optimizer's step want to see all parameters, which come one chunk after the other",
                where=f"step hooks of {type(self._optimizer).__name__}",
                remedy="use the engine's events (on_step_end) and powertrain.state, or let state rest on the device",
            )

    def _total(
        self, figures: torch.Tensor, params: Sequence[torch.nn.Parameter], how: Literal["sum", "max"] = "sum"
    ) -> torch.Tensor:
        """Combine figures of parameters over the ranks that hold pieces of them."""
        if self._groups.shards == 1:
            return figures
        rows = torch.tensor([self._numbers[param] for param in params], dtype=torch.int64)
        nothing = 0.0 if how == "sum" else -math.inf  # what a rank says of parameters that it has no piece of
        everything = figures.new_full((self._parameters, *figures.shape[1:]), nothing, device=self._communicator.device)
        everything[rows] = figures.to(everything)
        self._communicator.all_reduce(everything, self._groups.shard, reduction=how, label=f"{how} over tensors").wait()
        return everything[rows].to(figures)

    @torch.no_grad()
    def show(self) -> None:
        """Multiply the gradients by what the update did: from then on they are what it used."""
        if not isinstance(self.scale, torch.Tensor) and self.scale == 1.0:
            return
        for part in (part for unit in self._units for part in unit.gradients):
            if part.shard is not None:
                part.shard.mul_(self.scale)
        self.scale = 1.0

    def forget(self) -> None:
        """Take note that the gradients of the last step are gone."""
        self.scale = 1.0

    def _deliver(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Put the mean gradients where the optimizer looks for them; return them, by the masters that have one."""
        result = {}
        for part in (part for unit in self._units for part in unit.gradients):
            shard = part.shard
            assert shard is not None
            for segment in part.flat.segments:
                master = segment.master
                master.grad = None
                if not part.anywhere[segment.index]:
                    continue
                grad = segment.of(shard)
                if grad.dtype == master.dtype:
                    master.grad = grad
                elif self._flat is None:
                    master.grad = grad.to(master.dtype)
                result[master] = grad if master.grad is None else master.grad
        return result

    def _put_back(self) -> None:
        """Where the optimizer saw converted copies of gradients: show what it saw, and drop the copies."""
        for part in () if self._moves else (part for unit in self._units for part in unit.gradients):
            for segment in part.flat.segments:
                grad = segment.master.grad
                if grad is not None and part.shard is not None and grad.dtype != part.shard.dtype:
                    segment.of(part.shard).copy_(grad)
                    segment.master.grad = None

    def _check_groups(self) -> None:
        """Refuse parameters that came into the optimizer's groups behind our back.

        Raises:
            ShardingError: a group was added or changed after the engine was built.
        """
        if [len(group["params"]) for group in self._optimizer.param_groups] != self._lengths:
            raise ShardingError(
                "the optimizer's parameter groups were changed after powertrain.initialize",
                where="optimizer.param_groups",
                remedy="give the optimizer all its groups before; their numbers (lr, …) may change at any time",
            )

    def _norm(self, grads: Mapping[torch.nn.Parameter, torch.Tensor]) -> tuple[torch.Tensor, Handle]:
        """Start the global norm: its square over several shards, itself with one."""
        if self._moves:
            parts = [part for unit in self._units for part in unit.gradients]
            named = [(part.flat.named[index][0], norm) for part in parts for index, norm in part.norms()]
        else:
            named = [(self._name_of[master], grad) for master, grad in grads.items()]
        # In the order of registration, however units cut the model: sums round alike at every stage.
        figures = [figure for _, figure in sorted(named, key=lambda pair: self._order[pair[0]])]
        if any(figure.dtype.itemsize < 4 for figure in figures):  # a norm in 16 bits rounds, or is beyond their range
            figures = [torch.linalg.vector_norm(figure, dtype=torch.float32) for figure in figures]
        norm = torch.nn.utils.get_total_norm(figures)
        if self._groups.shards == 1:
            return norm, Done()
        square = norm.to(device=self._communicator.device, dtype=torch.float32).square()
        return square, self._communicator.all_reduce(square, self._groups.shard, label="gradient norm")
