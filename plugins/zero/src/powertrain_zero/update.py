"""The update of this rank's slices: scale, norm, clip, optimizer, unit by unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from powertrain.compat import has_step_hooks
from powertrain.context import Context
from powertrain.errors import PrecisionError, ShardingError
from powertrain.roles.communicator import Done, Handle
from powertrain.roles.optimizer import FlatOptimizer, Request, Update, blocks_of, clip_factor, granularity_of
from powertrain_zero.flat import Segment
from powertrain_zero.groups import Groups
from powertrain_zero.unit import Unit


class Updater:
    """Drives a torch optimizer over segments of flat shards.

    Args:
        units: whose segments are updated.
        optimizer: its groups are pointed at the segments, each group at those of its own
            parameters; a group that has none on this rank stays, empty.
        groups: over which ranks state is sharded.
        context: the run.
    """

    def __init__(
        self, units: Sequence[Unit], optimizer: torch.optim.Optimizer, groups: Groups, context: Context
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
        unit_of: dict[torch.nn.Parameter, Unit] = {}
        self._outs: dict[torch.nn.Parameter, torch.Tensor] = {}  # where new values go in the model's format
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
                    unit_of[segment.master] = unit
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
        self._members = {unit: [[] for _ in optimizer.param_groups] for unit in units}  # type: ignore[var-annotated]
        for number, group in enumerate(optimizer.param_groups):
            for master in group["params"]:
                self._members[unit_of[master]][number].append(master)
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
        self._by_unit = elementwise and of_torch and (travels or self._converts)
        self._scale: float | torch.Tensor = 1.0  # what the update multiplied gradients by, and they were not yet

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
        grads = self._deliver()
        inverse = 1.0 / grad_scale
        if self._flat is None and grad_scale != 1.0:
            for grad in grads.values():
                grad.mul_(inverse)
        norm, handle = self._norm(list(grads.values()))
        unscaled = inverse if self._flat is not None else 1.0

        def grad_norm() -> torch.Tensor:
            handle.wait()
            root = norm.sqrt() if self._groups.shards > 1 else norm
            return root * unscaled if unscaled != 1.0 else root

        self._scale = unscaled
        if check_overflow and not bool(grad_norm().isfinite()):
            self._put_back()
            return Update(applied=False, grad_norm=grad_norm)
        if clip is not None and self._flat is not None:
            self._scale = clip_factor(grad_norm(), clip) * unscaled
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
        listened = has_step_hooks(self._optimizer)  # who listens hears of one step, and sees what it uses
        if listened:  # in the master's format, which has room for what is scaled; _put_back takes the copy away
            copies = {m: grad.to(m.dtype).mul_(self._scale) for m, grad in grads.items() if grad.dtype != m.dtype}
            self.show()
            for master, grad in grads.items():
                master.grad = copies.get(master, grad)
        by_unit = self._by_unit and not listened
        with self._asked(grads):
            if not by_unit:
                with self._converted([group["params"] for group in self._optimizer.param_groups]):
                    self._optimizer.step()
            for unit in self._units:
                if by_unit:
                    with self._only(unit):
                        self._optimizer.step()
                handles.append(publish(unit))
        for published in handles:
            if published is not None:
                published.wait()

    def _asked(self, grads: Mapping[torch.nn.Parameter, torch.Tensor]) -> AbstractContextManager[None]:
        """Ask a flat optimizer to scale, and to cast into the whole buffers that stay, on its way."""
        if self._flat is None:
            return nullcontext()
        others = {master: grad for master, grad in grads.items() if master.grad is None}
        return self._flat.asked(Request(scale=self._scale, outs=self._outs, grads=others, total=self._total))

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
        if not isinstance(self._scale, torch.Tensor) and self._scale == 1.0:
            return
        for part in (part for unit in self._units for part in unit.gradients):
            part.shard.mul_(self._scale)
        self._scale = 1.0

    def forget(self) -> None:
        """Take note that the gradients of the last step are gone."""
        self._scale = 1.0

    def _deliver(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Put the mean gradients where the optimizer looks for them; return them, by the masters that have one."""
        result = {}
        for part in (part for unit in self._units for part in unit.gradients):
            for segment in part.flat.segments:
                master = segment.master
                master.grad = None
                if not part.anywhere[segment.index]:
                    continue
                grad = segment.of(part.shard)
                if grad.dtype == master.dtype:
                    master.grad = grad
                elif self._flat is None:
                    master.grad = grad.to(master.dtype)
                result[master] = grad if master.grad is None else master.grad
        return result

    def _put_back(self) -> None:
        """Where the optimizer saw converted copies of gradients: show what it saw, and drop the copies."""
        for part in (part for unit in self._units for part in unit.gradients):
            for segment in part.flat.segments:
                grad = segment.master.grad
                if grad is not None and grad.dtype != part.shard.dtype:
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

    def _norm(self, grads: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Handle]:
        """Start the global norm: its square over several shards, itself with one."""
        if any(grad.dtype.itemsize < 4 for grad in grads):  # a norm in 16 bits rounds, or is beyond their range
            grads = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        norm = torch.nn.utils.get_total_norm(grads)
        if self._groups.shards == 1:
            return norm, Done()
        square = norm.to(device=self._communicator.device, dtype=torch.float32).square()
        return square, self._communicator.all_reduce(square, self._groups.shard, label="gradient norm")

    @contextmanager
    def _only(self, unit: Unit) -> Iterator[None]:
        """Let the optimizer see one unit's segments, with their state in the master's format."""
        groups = self._optimizer.param_groups
        everything = [group["params"] for group in groups]
        mine = self._members[unit]
        try:
            for group, members in zip(groups, mine, strict=True):
                group["params"] = members
            with self._converted(mine):
                yield
        finally:
            for group, members in zip(groups, everything, strict=True):
                group["params"] = members

    @contextmanager
    def _converted(self, members: Sequence[Sequence[torch.nn.Parameter]]) -> Iterator[None]:
        """Let the state of some segments be in the master's format."""
        if not self._converts:
            yield
            return
        self._convert(members, self._master_dtype)
        yield
        self._convert(members, self._state_dtype)

    def _convert(self, members: Sequence[Sequence[torch.nn.Parameter]], dtype: torch.dtype) -> None:
        """Convert the optimizer state of some segments, scalars excepted."""
        for masters in members:
            for master in masters:
                state = self._optimizer.state.get(master, {})
                for key, value in state.items():
                    if isinstance(value, torch.Tensor) and value.ndim > 0 and value.is_floating_point():
                        state[key] = value.to(dtype)
