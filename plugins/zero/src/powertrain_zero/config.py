"""The ``[zero]`` table."""

from __future__ import annotations

from typing import Any, Literal

import attrs
from attrs import validators

from powertrain.errors import ShardingError

_at_least_one = validators.optional(validators.ge(1))


@attrs.frozen(kw_only=True)
class ZeroConfig:
    """What is sharded over the data ranks, and how the shards travel."""

    stage: Literal[1, 2, 3] = attrs.field()
    """1: optimizer state; 2: gradients as well; 3: parameters as well. Each stage needs less memory than the one
    before; 2 sends gradients once a micro-batch instead of once a step, 3 gathers parameters twice a micro-batch."""

    unit: str | int | list[str] | None = attrs.field(default=None)
    """Stage 3: what is gathered and reduced together: a module class by name, the paths of modules ("blocks.*"
    counts as each of them), or the most parameters in a unit. Absent: the model's repeated block; what is left is
    one unit."""

    bucket: int = attrs.field(default=4_000_000, validator=validators.ge(1))
    """Stages 1 and 2: neighbouring parameters are reduced together, up to this many elements. Larger buckets cost
    memory and start later; smaller ones cost a collective each. Default 4,000,000."""

    prefetch: int = attrs.field(default=1, validator=validators.ge(0))
    """Stage 3: units whose gathering starts ahead of their turn, forward and backward. Each costs the memory of
    a unit. Default 1."""

    reshard_after_forward: bool | int = attrs.field(default=True)
    """Stage 3: free a unit's parameters between forward and backward. false keeps them until backward is over; a
    number keeps a slice among as many neighbouring ranks (as ``secondary``). Default true."""

    shard_group: int | None = attrs.field(default=None, validator=_at_least_one)
    """Shard within groups of as many neighbouring ranks, and replicate across the groups (MiCS): collectives of a
    micro-batch stay within a group, gradients are averaged across once a step. Absent: over all."""

    secondary: int | None = attrs.field(default=None, validator=_at_least_one)
    """Stage 3: keep a second slice of each unit, after forward, within groups of as many neighbouring ranks, from
    which backward gathers (hpZ). Costs 1/n of the parameters, in the compute format. With ``shard_group``: within
    it. Absent: none."""

    gather: Literal["int8"] | None = None
    """Stage 3: the format in which parameters travel (qwZ: int8 and a scale for each 256 of them, half the bytes of
    fp16); the model computes with what arrives, the masters stay exact. Absent: the compute format."""

    reduce: Literal["int8", "int4"] | None = None
    """The format in which gradients travel between the ranks of a shard group (qgZ: all-to-all in two hops, summed
    in fp32; a half or a quarter of the bytes of fp16). Absent: ``[precision] reduce``."""

    node: int | None = attrs.field(default=None, validator=_at_least_one)
    """Neighbouring ranks on one host, the first hop of a quantized reduction. Absent: what the launcher says."""

    @reshard_after_forward.validator
    def _positive(self, attribute: attrs.Attribute[bool | int], value: bool | int) -> None:
        if not isinstance(value, bool) and value < 1:
            raise ValueError("expected true, false or a number of ranks from 1 up")

    @unit.validator
    def _some(self, attribute: attrs.Attribute[Any], value: str | int | list[str] | None) -> None:
        if isinstance(value, int) and value < 1:
            raise ValueError("expected a class name, paths of modules, or a number of parameters from 1 up")

    def __attrs_post_init__(self) -> None:
        if self.stage < 3:
            for key, default in (("reshard_after_forward", True), ("secondary", None), ("gather", None)):
                if getattr(self, key) != default:
                    raise ValueError(f"{key} needs stage = 3: before it, parameters are never sharded")
        if self.node is not None and self.reduce is None:
            raise ValueError("node needs reduce: only quantized gradients travel in hops")
        if self.shard_group == 1:
            for key in ("secondary", "gather", "reduce"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} has no effect with shard_group = 1: each rank holds everything")
        group = self.reshard_after_forward
        if self.secondary is not None and group is not True:
            raise ValueError("secondary and reshard_after_forward both say what is kept after forward; leave one out")

    @property
    def kept(self) -> tuple[str, int] | None:
        """Return the key that asks for a second slice after forward, and among how many ranks; None: none."""
        group = self.reshard_after_forward
        if not isinstance(group, bool):
            return "reshard_after_forward", group
        return None if self.secondary is None else ("secondary", self.secondary)

    @property
    def idle(self) -> list[str]:
        """The keys that say something which this stage has no use for.

        They are no mistake: who compares stages keeps one file.
        """
        keys = ("bucket",) if self.stage == 3 else ("unit", "prefetch")
        fields = attrs.fields_dict(ZeroConfig)
        return [key for key in keys if getattr(self, key) != fields[key].default]

    def check_ranks(self, ranks: int) -> None:
        """Check that ``ranks`` data ranks can be cut into the groups that are asked for.

        Raises:
            ShardingError: they cannot; says which sizes, and which numbers of ranks, would do.
        """
        shards = ranks if self.shard_group is None else self.shard_group
        if self.shard_group is not None:
            check_divides("shard_group", self.shard_group, ranks)
        grouped = shards != ranks
        if self.kept is not None:
            check_divides(*self.kept, shards, grouped=grouped)
        if self.node is not None and shards > 1:
            check_divides("node", self.node, shards, grouped=grouped)


def check_divides(key: str, size: int, ranks: int, *, grouped: bool = False) -> None:
    """Check that ``ranks`` can be cut into groups of ``size``.

    Args:
        key: of the ``[zero]`` table, which says the size.
        size: ranks in a group.
        ranks: that are cut.
        grouped: they are one shard group, not all data ranks.

    Raises:
        ShardingError: they cannot; says which sizes, and which numbers of ranks, would do.
    """
    if ranks % size == 0:
        return
    sizes = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
    near = " or ".join(str(n) for n in (ranks // size * size, (ranks // size + 1) * size) if n)
    who = f"the {ranks} ranks of a shard group" if grouped else f"{ranks} ranks"
    other = f"zero.shard_group to {near}" if grouped else f"start {near} ranks"
    raise ShardingError(
        f"{who} cannot be cut into groups of {size}",
        where=f"zero.{key}",
        expected=f"a divisor of {ranks}: {sizes}",
        found=str(size),
        remedy=f"set zero.{key} to one of these, or {other}",
    )
