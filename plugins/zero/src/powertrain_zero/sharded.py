"""The sharded optimizer: ZeRO's three stages as three switches of one class.

Stage 1 shards optimizer state, 2 gradients as well, 3 parameters as well
(Rajbhandari et al., "ZeRO", 2020). What differs is where things rest: whether a
flat buffer's parameters stay whole (``resident``) and whether its gradients do.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch

from powertrain.context import Context
from powertrain.errors import CommunicationError, ShardingError
from powertrain.kernels import kernel
from powertrain.kernels.blockwise import BLOCK, Blockwise
from powertrain.names import named_parameters
from powertrain.roles.checkpoint import CheckpointReader, TensorSlice
from powertrain.roles.communicator import Handle
from powertrain.roles.optimizer import (
    FlatOptimizer,
    OptimizerWrapper,
    Update,
    blocks_of,
    granularity_of,
    takes_pieces,
    whole_parameters,
)
from powertrain_zero.arena import Arena
from powertrain_zero.chunk import Tiers
from powertrain_zero.config import ZeroConfig
from powertrain_zero.flat import ALIGN, Flat, flat_layout, masters_apart
from powertrain_zero.flow import Flow
from powertrain_zero.generation import serve_generation
from powertrain_zero.gradients import BufferPool, FlatGradients, add_up_whole
from powertrain_zero.groups import Groups, hops
from powertrain_zero.needs import Needs
from powertrain_zero.parts import Parts
from powertrain_zero.passes import Ballot
from powertrain_zero.quantized_reduce import QuantizedReduce
from powertrain_zero.quantized_wire import QuantizedGather
from powertrain_zero.reductions import Reductions
from powertrain_zero.saved import SavedState
from powertrain_zero.unit import Unit
from powertrain_zero.units import UnitPlan, kinds, plan_buckets, plan_units
from powertrain_zero.update import Updater
from powertrain_zero.wire import GatherWire, PlainGather, PlainReduce, ReduceWire

_log = logging.getLogger("powertrain.zero")


class ShardedOptimizer(OptimizerWrapper):
    """Shards a model's training state over the data dimension.

    Args:
        model: its parameters become views of flat buffers, in place.
        optimizer: its groups are pointed at this rank's slices.
        config: the ``[zero]`` table.
        context: the run.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: ZeroConfig, context: Context
    ) -> None:
        self.optimizer = optimizer
        self.groups = Groups.build(config, context.communicator)
        self._context = context
        self._communicator = context.communicator
        self._whole = whole_parameters(optimizer)
        self._blocks = blocks_of(optimizer)
        plans = plan_units(model, config.unit)
        self.tiers = Tiers.of(context)
        self.stage = self._effective_stage(config)
        if self.stage < 3:
            plans = plan_buckets(model, config.bucket, self._whole, self.groups.shards)
        if self.groups.shards == 1 and self.tiers.stay:
            _log.info("stage %d among 1 rank: there is nobody to keep the rest, everything stays whole", config.stage)
        elif config.idle:
            _log.info("stage %d has no use for %s: nothing changes by it", config.stage, " and ".join(config.idle))
        self._first = True
        self._round_open = False
        self._flushed = False
        self._writing: list[list[torch.nn.Parameter]] = []
        self._flights: deque[FlatGradients] = deque()
        self._pool = BufferPool(self._communicator, self.groups.shard, context.recipe.reduce)
        self._gather_wire, self._reduce_wire, multiple = self._wires(config)
        self._align = math.lcm(ALIGN, *self._blocks.values())
        self._multiple = math.lcm(multiple, self._align)
        self._whole_gradients = add_up_whole(self.stage, self.groups.shards, context.batch.accumulation)
        self._pieces = takes_pieces(optimizer) and granularity_of(optimizer) == "element"
        masters = Arena(lambda numel, dtype: torch.zeros(numel, dtype=dtype, device=self._communicator.device))
        gradients = Arena(lambda numel, dtype: self._communicator.empty(numel, dtype, self.groups.shard))
        needs = Needs(self.tiers, optimizer, context.recipe.master, context.recipe.state)
        for plan in plans:
            self._announce(plan, masters, gradients, needs)
        needs.announce()
        masters.allocate()
        gradients.allocate()
        self.units = [self._make_unit(turn, plan, masters, gradients) for turn, plan in enumerate(plans)]
        self._home = {
            param: (unit, flat, index)
            for unit in self.units
            for flat in unit.flats
            for index, (_, param) in enumerate(flat.named)
        }
        self._gradients_of = {
            param: (unit, gradients, index)
            for unit in self.units
            for gradients in unit.gradients
            for index, (_, param) in enumerate(gradients.flat.named)
        }
        names = [name for name, _ in named_parameters(model)]
        self._updater = Updater(self.units, optimizer, self.groups, self.tiers, names, context)
        self._saved = SavedState(self.units, optimizer, self._updater, context)
        self._parts = Parts(optimizer, self._updater, self._blocks)
        for param in self._gradients_of:
            param.grad = None  # of a loop before this one: autograd would add to it
        self._hooks = [param.register_post_accumulate_grad_hook(self._arrived) for param in self._gradients_of]
        self._reductions = Reductions(self.units, self._communicator)
        self._flow: Flow | None = None
        self._generation: Any = None
        if self.stage == 3:
            self._flow = Flow(
                model,
                self.units,
                prefetch=config.prefetch,
                reshard=config.reshard_after_forward is not False,
                ballot=Ballot(self._communicator, self.groups.shard),
                reducing=lambda: self._round_open,
                reduced=self._end_round,
            )
            self._generation = serve_generation(model, self._flow)

    # --- construction -----------------------------------------------------------------

    def _effective_stage(self, config: ZeroConfig) -> int:
        """Return the stage by which memory is laid out.

        Alone, there is nobody to keep the rest: what rests on the device stays whole.

        Raises:
            ShardingError: what is to rest elsewhere stays whole at this stage.
        """
        for category, least in (("gradients", 2), ("parameters", 3)):
            tier = getattr(self.tiers, category)
            if not tier.stays and config.stage < least:
                raise ShardingError(
                    f"{category} stay whole on every rank at stage {config.stage}: they cannot rest on {tier.name}",
                    where="zero.stage",
                    expected=f"stage = {least}" + (" or 3" if least == 2 else ""),
                    found=str(config.stage),
                    remedy=f"raise the stage, or let {category} rest on the device",
                )
        if self.groups.shards > 1:
            return config.stage
        return 3 if not self.tiers.parameters.stays else 2 if not self.tiers.gradients.stays else 1

    def _wires(self, config: ZeroConfig) -> tuple[GatherWire, ReduceWire, int]:
        """Return how parameters and gradients travel, and of what a slice's length is a multiple."""
        communicator, shard = self._communicator, self.groups.shard
        gather: GatherWire = PlainGather(communicator, shard)
        reduce: ReduceWire = PlainReduce(communicator, shard)
        if self.groups.shards == 1:
            return gather, reduce, ALIGN  # nothing travels
        if config.gather is not None:
            gather = QuantizedGather(communicator, shard, self._codec(8))
        if config.reduce is not None:
            nodes = hops(config, self.groups, communicator, self._context.rank.local_size)
            reduce = QuantizedReduce(communicator, nodes, self._codec(8 if config.reduce == "int8" else 4))
        return gather, reduce, ALIGN if config.gather is None and config.reduce is None else BLOCK

    def _codec(self, bits: Literal[8, 4]) -> Blockwise:
        """Return the codec of the wire, with the device's own kernels where it has them."""
        own = partial(kernel, self._context.accelerator)
        return Blockwise(bits, quantize=own("quantize"), dequantize=own("dequantize"))

    def _announce(self, plan: UnitPlan, masters: Arena, gradients: Arena, needs: Needs) -> None:
        """Tell how much of a unit stays on this rank beside whole buffers, and how much rests elsewhere."""
        recipe, shards = self._context.recipe, self.groups.shards
        for kind, named in kinds(plan, recipe.parameters, self._whole).items():
            layout = flat_layout(named, shards, whole_tensors=kind.whole, multiple=self._multiple, align=self._align)
            numel = layout.numel // shards
            source = recipe.master if kind.trainable else kind.dtype
            apart = kind.trainable and masters_apart(self.tiers, kind.dtype, source, self._communicator.device)
            if apart:
                source = kind.dtype
            needs.add(numel, source=source, gradient=recipe.accumulate if kind.trainable else None, apart=apart)
            # Otherwise the slice is a part of the whole buffer, or rests elsewhere.
            if (self.stage == 3 and self.tiers.parameters.stays) or (self.stage < 3 and source != kind.dtype):
                masters.want(numel, source)
            if kind.trainable and not self._whole_gradients and self.tiers.gradients.stays:
                gradients.want(numel, recipe.accumulate)

    def _make_unit(self, turn: int, plan: UnitPlan, masters: Arena, gradient_arena: Arena) -> Unit:
        """Give a unit its memory."""
        recipe = self._context.recipe
        flats = [
            Flat(
                named,
                dtype=kind.dtype,
                master_dtype=recipe.master if kind.trainable else kind.dtype,
                groups=self.groups,
                communicator=self._communicator,
                birth=self._context.birth,
                arena=masters,
                tiers=self.tiers,
                resident=self.stage < 3,
                pieces=self._pieces,
                whole_tensors=kind.whole,
                multiple=self._multiple,
                align=self._align,
                turn=turn,
            )
            for kind, named in kinds(plan, recipe.parameters, self._whole).items()
        ]
        gradients = [
            FlatGradients(
                flat,
                self.groups,
                self._communicator,
                self._reduce_wire,
                self._pool,
                self._flights,
                recipe.accumulate,
                gradient_arena,
                self.tiers.gradients,
                whole=self._whole_gradients,
            )
            for flat in flats
            if flat.trainable
        ]
        # Whole tensors lived shortly here: what they left in the allocator is not to add up to the model.
        self._context.accelerator.release_unused(self._context.device)
        return Unit(plan, flats, gradients, self._gather_wire, self.groups, self._communicator)

    # --- gradients ----------------------------------------------------------------------

    def begin(self, *, last: bool, once: bool = False) -> None:
        """Prepare for a micro-batch: before stage 2 only the last one's gradients travel."""
        self._end_round()
        self._flushed = False
        self._parts.forget()
        if self._first:
            self._updater.forget()
            self._check_frozen()
            if self._flow is not None:
                self._flow.reset()  # forward passes since the last step that nobody went back through
        for unit in self.units:
            for gradients in unit.gradients:
                gradients.begin(first=self._first)
        self._first = False
        self._round_open = last or self.stage > 1
        if self._flow is None and self._round_open:
            self._reductions.begin()

    def _check_frozen(self) -> None:
        """Refuse to leave a parameter untrained in silence.

        Raises:
            ShardingError: it was frozen when memory was laid out, and is not any more.
        """
        for unit in self.units:
            for flat in unit.flats:
                for name, param in () if flat.trainable else flat.named:
                    if param.requires_grad:
                        raise ShardingError(
                            "a parameter that was frozen requires a gradient now",
                            where=name,
                            remedy="set requires_grad before powertrain.initialize: gradients and optimizer state are "
                            "laid out there; to unfreeze later, save, and load into a new engine",
                        )

    @torch.no_grad()  # also where gradients are differentiated themselves
    def _arrived(self, param: torch.Tensor) -> None:
        """Move a gradient that autograd has just finished into its buffer."""
        self._updater.late.join()  # it reads the gradients that are replaced now
        unit, gradients, index = self._gradients_of[param]  # type: ignore[index]
        grad = param.grad
        assert grad is not None
        param.grad = None
        if not gradients.is_expected(index):
            # A batch goes a new way. What else lies on it is to be sent unit by unit, not all at the end.
            for other in (part for any_unit in self.units for part in any_unit.gradients):
                other.expect_all()
        gradients.add(index, grad.to_dense() if grad.is_sparse else grad)
        if self._flow is None:
            self._reductions.arrived(unit)
        elif gradients.complete:
            self._flow.completed()

    def _end_round(self) -> None:
        """Send what was not complete: the same on every rank, whatever branches it took."""
        if self._round_open and self._flow is None:
            self._reductions.finish()
        self._round_open = False

    def flush(self) -> None:
        """Send the rest, and agree on which parameters got a gradient anywhere, and what came late."""
        if self._round_open:
            self._end_round()
        if self._flushed:
            return
        if self._flow is None:
            self._reductions.learn()
        gradients = [part for unit in self.units for part in unit.gradients]
        flags = [float(used) for part in gradients for used in part.used]
        flags += [float(part.waiting) for part in gradients]
        flags += [float(part.sent_early) for part in gradients]
        agreed = iter(self._agree(flags))
        for part in gradients:
            part.anywhere = [next(agreed) > 0 for _ in part.used]
        for part in gradients:
            if next(agreed):
                part.send()
        for unit in self.units:
            early = [next(agreed) for _ in unit.gradients]
            if any(early) and self._flow is not None:
                self._flow.delay(unit)
        # Settled in one order on all ranks: a reduction in several hops needs the others for each.
        for part in gradients:
            part.settle()
        if self.groups.replica is not None:
            for part in gradients:
                part.across()
        self._flushed = True

    def _agree(self, flags: list[float]) -> list[float]:
        """Return the largest of each flag over all data ranks."""
        if self._communicator.size("data") == 1:
            return flags
        values = torch.tensor(flags, device=self._communicator.device)
        self._communicator.all_reduce(values, reduction="max", label="which parameters got a gradient").wait()
        agreed: list[float] = values.tolist()
        return agreed

    def discard(self) -> None:
        """Drop the gradients gathered so far; ranks that took different branches have sent different ones of them."""
        self._end_round()
        if self._flow is not None:
            self._flow.reset()
        for unit in self.units:
            for gradients in unit.gradients:
                gradients.drop()
        self._flushed = False
        self._first = True

    # --- the update ---------------------------------------------------------------------

    @torch.no_grad()
    def step(self, *, grad_scale: float, clip: float | None, check_overflow: bool) -> Update:
        """Finish reductions, clip, update this rank's slices, and publish them."""
        self.flush()
        self._parts.forget()
        if self._flow is not None:
            self._flow.reset()
        for unit in self.units:
            for gradients in unit.gradients:
                gradients.settle()
                gradients.learn()
        self._pool.trim()
        self._first = True
        flat = isinstance(self.optimizer, FlatOptimizer)  # it casts on its way
        return self._updater.step(
            lambda unit: self.publish_unit(unit, cast=flat),
            grad_scale=grad_scale, clip=clip, check_overflow=check_overflow,
        )  # fmt: skip

    @torch.no_grad()
    def catch_up(self) -> None:
        """Let the model see updates that it was to see one step later; every rank calls it."""
        for handle in [self.publish_unit(unit, cast=True) for unit in self._updater.late.show()]:
            if handle is not None:
                handle.wait()

    @torch.no_grad()
    def publish_unit(self, unit: Unit, *, frozen: bool = False, cast: bool = False) -> Handle | None:
        """Start bringing new values of the masters into a unit's parameters, where these stay whole."""
        unit.forget_kept()
        if unit.resident:
            return unit.publish(frozen=frozen, cast=cast)
        unit.refresh()
        return None

    @torch.no_grad()
    def publish(self) -> None:
        """Make the model follow values that were written into this rank's slices."""
        self.catch_up()
        self._parts.write_back()
        for unit in self.units:
            for flat in unit.flats:
                flat.refresh()
        # What a block is writing into whole parameters is left alone: it is carried over at the block's end.
        written = [(param, param.detach().clone()) for params in self._writing for param in params]
        handles = [self.publish_unit(unit, frozen=True) for unit in self.units]
        for handle in handles:
            if handle is not None:
                handle.wait()
        for param, values in written:
            param.copy_(values)

    # --- access -------------------------------------------------------------------------

    def parts(self, param: torch.nn.Parameter) -> dict[str, TensorSlice]:
        """Return this rank's slices of a parameter, its gradient and its optimizer state."""
        self._updater.late.join()
        unit, flat, index = self._home[param]
        gradients = next((part for part in unit.gradients if part.flat is flat), None)
        if gradients is None or not self._flushed or not gradients.anywhere[index]:
            gradients = None
        return self._parts.of(flat, index, gradients)

    @torch.no_grad()
    def visit(self, action: Callable[[torch.optim.Optimizer], None]) -> None:
        """Let ``action`` change masters and optimizer state, some at a time where they rest elsewhere."""
        self.catch_up()
        self._parts.forget()
        self._updater.visit(action)

    def gathered(self, params: Sequence[torch.nn.Parameter], *, write: bool = False) -> AbstractContextManager[None]:
        """Return a context in which ``params`` are whole."""
        return self._gathered(list(params), write)

    @contextmanager
    def _gathered(self, params: list[torch.nn.Parameter], write: bool) -> Iterator[None]:
        self.catch_up()
        units = [unit for unit in self.units if any(self._home[param][0] is unit for param in params)]
        for unit in units:
            unit.hold()
        if write:
            self._writing.append(params)
        try:
            yield
        except CommunicationError:  # nobody is there to agree with
            raise
        except Exception:
            # What was written is there, and ranks must not differ in it.
            if write:
                self._take_back(params, units)
            raise
        else:
            if write:
                self._take_back(params, units)
        finally:
            self._writing = [others for others in self._writing if others is not params]
            for unit in units:
                unit.let_go()

    @torch.no_grad()
    def _take_back(self, params: list[torch.nn.Parameter], units: Sequence[Unit]) -> None:
        """Keep what was written into whole parameters: the first data rank's values."""
        communicator = self._communicator
        if communicator.size("data") > 1:
            handles = []
            for param in params:
                _, flat, index = self._home[param]
                view = flat.view(flat.full, index)
                handles.append(communicator.broadcast(view, 0, label=f"written {flat.named[index][0]}"))
            for handle in handles:
                handle.wait()
        for unit in units:
            unit.forget_kept()
            for flat in unit.flats:
                flat.take_back()
        self._parts.forget()

    # --- checkpoints --------------------------------------------------------------------

    def tensors(self) -> list[TensorSlice]:
        """Return this rank's slices of parameters (masters) and optimizer state."""
        self.catch_up()
        return self._saved.tensors()

    def values(self) -> dict[str, Any]:
        """Return optimizer state that is no tensor; gathered from the ranks that have it."""
        return self._saved.values()

    def load(self, reader: CheckpointReader) -> list[str]:
        """Fill this rank's slices in one read."""
        self.catch_up()
        self._parts.forget()
        names = self._saved.load(reader)
        self.publish()
        return names

    def close(self) -> None:
        """Take hooks off the model; parameters that are not gathered stay so."""
        self._updater.late.join()
        for hook in self._hooks:
            hook.remove()
        for unit in self.units:
            for flat in unit.flats:
                flat.close()
        if self._flow is not None:
            self._flow.close()
        if self._generation is not None:
            self._generation()
