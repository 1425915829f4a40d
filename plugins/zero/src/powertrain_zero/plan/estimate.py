"""How much memory a rank needs, by category, from the layout that a run would have.

Nothing is allocated: units and buckets are planned and laid out as
``ShardedOptimizer`` does it, padding included, and their bytes are added up.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import attrs
import torch

from powertrain.kernels.blockwise import BLOCK
from powertrain.layout import FlatLayout
from powertrain.plugin import Rest
from powertrain_zero.config import ZeroConfig
from powertrain_zero.flat import ALIGN, flat_layout
from powertrain_zero.gradients import IN_FLIGHT, add_up_whole
from powertrain_zero.plan.activations import Activations
from powertrain_zero.plan.away import away, resting, stage_alone
from powertrain_zero.plan.probe import OptimizerFacts
from powertrain_zero.units import UnitPlan, kinds, plan_buckets, plan_units

if TYPE_CHECKING:
    from powertrain.precision import Recipe


ALLOCATOR = 0.06
"""What glibc's allocator keeps beyond what is in use, as a part of the tensors: 3 to 8 % in the runs that the tests
compare with. (There is next to nothing with MALLOC_MMAP_THRESHOLD_=131072.) Devices' allocators were not measured."""

ALLOCATOR_MOVING = 0.6
"""The same where units come from elsewhere, by which little stays: 50 to 70 %, of less. Giving it back after each step
costs more than it spares: fresh memory is slow."""

ALLOCATOR_GATHERING = 0.16
"""The same in stage 3, where units come and go between tensors that stay: 15 to 23 %."""


@attrs.frozen(kw_only=True)
class Need:
    """Bytes that one rank needs.

    Attributes:
        parameters: as the model uses them, the masters that the optimizer updates, and buffers of the model.
        gradients: where they add up.
        optimizer: its state.
        gathered: whole units of stage 3, while they are used.
        activations: what forward and backward need, None when it could not be measured.
        communication: gradients on their way, and what the transport receives into.
        update: what lives only within an update, after the activations.
        transfers: host memory for what is on its way from and to where it rests; counts where that is the device's.
        host: what rests in the host's memory, beside a device of its own.
        disk: what rests on disks.
        allocator: what the host's allocator keeps between the pieces.
        birth: the most while a deferred model gets its first values.
        birth_whole: the same for a model that was built without ``powertrain.deferred``.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int | None
    communication: int
    update: int
    birth: int
    birth_whole: int
    allocator: int = 0
    transfers: int = 0
    host: int = 0
    disk: int = 0

    @property
    def tensors(self) -> int:
        """The most bytes of tensors in a training step: the update begins when the activations have gone."""
        passes = self.gathered + (self.activations or 0)
        rest = self.parameters + self.gradients + self.optimizer + self.communication + self.transfers
        return rest + max(passes, self.update)

    @property
    def training(self) -> int:
        """The most in a training step."""
        return self.tensors + self.allocator

    @property
    def peak(self) -> int:
        """The most of all, for a deferred model."""
        return max(self.training, self.birth)


@attrs.frozen(kw_only=True)
class Case:
    """What one estimate is for.

    Attributes:
        zero: the ``[zero]`` table; None: replicated.
        ranks: data ranks.
        recipe: number formats.
        on_host: memory is the host's, where pages count once touched.
        accumulation: micro-batches in a step.
        whole: names of the parameters that the optimizer must see whole; None: all, unless it takes pieces.
        rests: what rests elsewhere than on the device.
    """

    zero: ZeroConfig | None
    ranks: int
    accumulation: int
    recipe: Recipe
    on_host: bool
    whole: frozenset[str] | None = None
    rests: Mapping[str, Rest] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Piece:
    """One flat buffer of a run.

    Attributes:
        unit: the place of its unit.
        layout: its layout.
        cut: parameters may lie in several slices.
        trainable: whether it has gradients and masters.
        itemsize: bytes of a parameter as the model uses it.
        shards: how many slices it has.
    """

    unit: int
    layout: FlatLayout
    cut: bool
    trainable: bool
    itemsize: int
    shards: int

    @property
    def numel(self) -> int:
        """Its elements, padding included."""
        return self.layout.numel

    @property
    def slice(self) -> int:
        """The elements of one rank's slice."""
        return self.numel // self.shards

    @property
    def whole(self) -> int:
        """Its bytes when it is whole."""
        return self.numel * self.itemsize


def with_stage(zero: ZeroConfig | None, stage: Literal[0, 1, 2, 3]) -> ZeroConfig | None:
    """Return the table with another stage, without the keys that it does not take; None for stage 0."""
    if stage == 0:
        return None
    table = zero or ZeroConfig(stage=1)
    if stage == 3:
        return attrs.evolve(table, stage=3)
    return attrs.evolve(table, stage=stage, reshard_after_forward=True, secondary=None, gather=None)


def estimate(model: torch.nn.Module, case: Case, optimizer: OptimizerFacts, activations: Activations) -> Need:
    """Add up what a rank needs, the one with the fullest slices.

    Args:
        model: on the meta device.
        case: for which stage, ranks and formats.
        optimizer: what it keeps.
        activations: what forward and backward need.

    Raises:
        ShardingError: the model or the ranks cannot be cut as the case says.
    """
    if case.zero is None:
        need = _replicated(model, case, optimizer, activations)
    else:
        need = _sharded(model, case, case.zero, optimizer, activations)
    if not case.on_host:
        return need
    kept = ALLOCATOR_GATHERING if need.gathered else ALLOCATOR
    if need.gathered and "parameters" in resting(case.rests, 3, on_host=True):
        kept = ALLOCATOR_MOVING
    return attrs.evolve(need, allocator=int(kept * need.tensors))


# --- stage 0 ------------------------------------------------------------------------------


def _replicated(model: torch.nn.Module, case: Case, optimizer: OptimizerFacts, activations: Activations) -> Need:
    recipe = case.recipe
    model_size, master, reduce = recipe.parameters.itemsize, recipe.master.itemsize, recipe.reduce.itemsize
    named = list(model.named_parameters())
    trainable = [param for _, param in named if param.requires_grad]
    numel = sum(param.numel() for param in trainable)
    largest = max((param.numel() for _, param in named), default=0)
    parameters = sum(_used(param, recipe) * param.numel() for _, param in named) + _buffers(model, recipe)
    if recipe.master != recipe.parameters:
        parameters += numel * master
    bucketed = case.ranks > 1 or recipe.reduce != recipe.parameters
    gradients = (numel + len(trainable)) * reduce if bucketed else numel * model_size
    update = numel * master if bucketed and recipe.reduce != recipe.master else 0
    update += _temporary(optimizer, case, largest, numel)
    return Need(
        parameters=parameters,
        gradients=gradients,
        optimizer=sum(optimizer.state_bytes(param.shape) for param in trainable),
        gathered=0,
        activations=activations.peak,
        communication=0,
        update=update,
        birth=parameters + (gradients if bucketed else 0) + largest * 4,
        birth_whole=_built(model) + max(0, parameters - _built(model)) + (gradients if bucketed else 0),
    )


# --- stages 1 to 3 -------------------------------------------------------------------------


def _sharded(
    model: torch.nn.Module, case: Case, zero: ZeroConfig, optimizer: OptimizerFacts, activations: Activations
) -> Need:
    recipe = case.recipe
    shards = shard_count(zero, case.ranks)
    rests = resting(case.rests, zero.stage, on_host=case.on_host)
    stage = zero.stage if shards > 1 else stage_alone(rests)
    whole_ones = _whole(model, case, optimizer)
    plans = plan_buckets(model, zero.bucket, whole_ones, shards) if stage < 3 else plan_units(model, zero.unit)
    pieces = [
        piece
        for place, plan in enumerate(plans)
        for piece in _pieces(place, plan, case, zero, optimizer.align, whole_ones, shards)
    ]
    trainable = [piece for piece in pieces if piece.trainable]
    master, accumulate = recipe.master.itemsize, recipe.accumulate.itemsize

    parameters = _buffers(model, recipe)
    for piece in pieces:
        if stage < 3:
            parameters += piece.whole
        if stage == 3 or (piece.trainable and piece.itemsize != master):
            parameters += piece.slice * (master if piece.trainable else piece.itemsize)
    whole = add_up_whole(stage, shards, case.accumulation)
    gradients = sum(piece.numel if whole else piece.slice for piece in trainable) * accumulate

    state = _state(trainable, optimizer, recipe)
    gone = away(pieces, case, rests, optimizer, state, stage)
    parameters -= gone.parameters
    gradients -= gone.gradients

    converts = recipe.state != recipe.master and not optimizer.flat
    by_unit = optimizer.pieces and (shards > 1 or converts)
    slices: dict[int, int] = defaultdict(int)
    for piece in trainable:
        slices[piece.unit] += piece.slice
    fullest = max(slices.values(), default=0)
    largest = max((min(math.prod(e.shape), p.slice) for p in trainable for e in p.layout.entries), default=0)
    update = _temporary(optimizer, case, largest, fullest if by_unit else sum(slices.values()))
    if recipe.accumulate != recipe.master and not optimizer.flat:
        update += sum(slices.values()) * master
    if by_unit and converts:
        update += optimizer.converted_bytes(fullest, master)

    gathered = _gathered(plans, pieces, zero, shards) if stage == 3 else 0
    birth = parameters + gradients
    largest_param = max((param.numel() for param in model.parameters()), default=0) * 4
    largest_unit = max(_whole_units(pieces).values(), default=0) if stage == 3 else 0
    return Need(
        parameters=parameters,
        gradients=gradients,
        optimizer=state - gone.optimizer,
        gathered=gathered,
        activations=activations.peak,
        communication=_communication(trainable, case, zero, stage, shards, whole=whole),
        update=update,
        birth=birth + max(largest_param, largest_unit),
        birth_whole=max(_built(model) + largest_unit, birth),
        transfers=gone.transfers if case.on_host else 0,
        host=gone.host + (0 if case.on_host else gone.transfers),
        disk=gone.disk,
    )


def shard_count(zero: ZeroConfig, ranks: int) -> int:
    """Return over how many ranks state is sharded.

    Raises:
        ShardingError: the ranks cannot be cut into groups of that size.
    """
    zero.check_ranks(ranks)
    return ranks if zero.shard_group is None else zero.shard_group


def _whole(model: torch.nn.Module, case: Case, optimizer: OptimizerFacts) -> frozenset[torch.nn.Parameter]:
    """Return the parameters that the optimizer must see whole."""
    if optimizer.pieces:
        return frozenset()
    return frozenset(param for name, param in model.named_parameters() if case.whole is None or name in case.whole)


def _pieces(
    place: int,
    plan: UnitPlan,
    case: Case,
    zero: ZeroConfig,
    align: int,
    whole: frozenset[torch.nn.Parameter],
    shards: int,
) -> Iterator[Piece]:
    """Yield a unit's flat buffers: trainable and frozen parameters apart, types apart, and whole ones apart."""
    quantized = shards > 1 and (zero.gather is not None or zero.reduce is not None)
    align = math.lcm(ALIGN, align)
    for kind, named in kinds(plan, case.recipe.parameters, whole).items():
        layout = flat_layout(
            named,
            shards,
            whole_tensors=kind.whole,
            multiple=math.lcm(align, BLOCK if quantized else ALIGN),
            align=align,
        )
        yield Piece(
            unit=place,
            layout=layout,
            cut=not kind.whole,
            trainable=kind.trainable,
            itemsize=kind.dtype.itemsize,
            shards=shards,
        )


def _state(pieces: Sequence[Piece], optimizer: OptimizerFacts, recipe: Recipe) -> int:
    """Return the optimizer state of the fullest rank."""
    kept = recipe.state.itemsize if recipe.state != recipe.master else None
    total = sum(optimizer.state_bytes((piece.slice,), kept) for piece in pieces if piece.cut)
    loads: dict[int, int] = defaultdict(int)
    for piece in (piece for piece in pieces if not piece.cut):
        for entry in piece.layout.entries:
            # Units take turns with who gets the largest.
            loads[(entry.start // piece.slice + piece.unit) % piece.shards] += optimizer.state_bytes(entry.shape, kept)
    return total + max(loads.values(), default=0)


def _whole_units(pieces: Sequence[Piece]) -> dict[int, int]:
    sizes: dict[int, int] = defaultdict(int)
    for piece in pieces:
        sizes[piece.unit] += piece.whole
    return sizes


def _gathered(plans: Sequence[UnitPlan], pieces: Sequence[Piece], zero: ZeroConfig, shards: int) -> int:
    """Return the bytes of units that are whole at once, and of slices that are kept for backward."""
    sizes = _whole_units(pieces)
    total = sum(sizes.values())
    if zero.reshard_after_forward is False:
        return total
    whole = sum(sizes[place] for place, plan in enumerate(plans) if plan.whole_pass)
    others = [sizes[place] for place, plan in enumerate(plans) if not plan.whole_pass]
    window = 1 + zero.prefetch
    most = max((sum(others[start : start + window]) for start in range(max(1, len(others) - zero.prefetch))), default=0)
    group = zero.secondary if zero.reshard_after_forward is True else int(zero.reshard_after_forward)
    kept = total // group if group is not None and group != shards else 0
    arriving = max(sizes.values(), default=0) // 2 if zero.gather is not None else 0
    return whole + most + kept + arriving


def _communication(
    pieces: Sequence[Piece], case: Case, zero: ZeroConfig, stage: int, shards: int, *, whole: bool
) -> int:
    """Return the bytes of gradients on their way; ``whole``: they add up in buffers that stay."""
    if not pieces:
        return 0
    reduce = case.recipe.reduce
    sizes = sorted((piece.numel for piece in pieces), reverse=True)
    borrows = not whole or case.recipe.accumulate != reduce
    buffers = 0
    if borrows:
        # The root's buffer is open through all of backward, beside those under way.
        count = min(len(sizes), IN_FLIGHT + (stage == 3))
        # Each is as large as the largest; but of the host's memory only what is touched counts.
        buffers = (sum(sizes[:count]) if case.on_host else count * sizes[0]) * reduce.itemsize
    if shards == 1:
        return buffers
    if zero.reduce is not None:
        encoded = sizes[0] * (1 if zero.reduce == "int8" else 0.5) * (1 + 4 / BLOCK)
        return buffers + IN_FLIGHT * 2 * int(encoded) + sizes[0] // shards * 4
    return buffers + (_received(sizes, shards, reduce.itemsize) if case.on_host else 0)


def _received(sizes: Sequence[int], shards: int, itemsize: int) -> int:
    """Return what the host's transport receives into: the shards of the others, of each reduction under way."""
    return sum((shards - 1) * (size // shards) * itemsize for size in sizes[:IN_FLIGHT])


# --- both ------------------------------------------------------------------------------------


def _temporary(optimizer: OptimizerFacts, case: Case, largest: int, together: int) -> int:
    """Return what an update computes with: on the host tensor by tensor, on devices for a whole call at once."""
    return int(optimizer.temporary * (largest if case.on_host else together))


def _used(param: torch.Tensor, recipe: Recipe) -> int:
    return recipe.parameters.itemsize if param.is_floating_point() else param.element_size()


def _buffers(model: torch.nn.Module, recipe: Recipe) -> int:
    return sum(buffer.numel() * _used(buffer, recipe) for buffer in model.buffers())


def _built(model: torch.nn.Module) -> int:
    """Return the bytes of a model as its constructor makes it."""
    return sum(tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
               for tensor in (*model.parameters(), *model.buffers()))  # fmt: skip
