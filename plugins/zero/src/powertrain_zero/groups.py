"""Over which ranks state is sharded, and over which it is replicated."""

from __future__ import annotations

import attrs

from powertrain.errors import ShardingError
from powertrain.roles.communicator import Communicator
from powertrain_zero.config import ZeroConfig


@attrs.frozen(kw_only=True)
class Groups:
    """The data dimension as shards and replicas.

    Attributes:
        shard: the dimension whose ranks hold one copy of the state together.
        shards: how many they are; ``index`` is this rank's place.
        replica: the dimension across copies; None when there is one copy.
        secondary: the dimension that backward gathers along; None: ``shard`` again.
    """

    shard: str
    shards: int
    index: int
    replica: str | None = None
    secondary: str | None = None

    @classmethod
    def build(cls, config: ZeroConfig, communicator: Communicator) -> Groups:
        """Make the groups of a ``[zero]`` table; called on every rank.

        Raises:
            ShardingError: a group size does not divide the ranks; says which sizes do.
        """
        ranks = communicator.size("data")
        shard, replica = "data", None
        if config.shard_group is not None and config.shard_group != ranks:
            check_divides("shard_group", config.shard_group, ranks)
            shard, replica = communicator.split("data", config.shard_group)
        group = config.reshard_after_forward
        kept, key = config.secondary, "secondary"
        if not isinstance(group, bool):
            kept, key = group, "reshard_after_forward"
        secondary = None
        shards = communicator.size(shard)
        if kept is not None and kept != shards:
            check_divides(key, kept, shards)
            secondary, _ = communicator.split("data", kept)
        return cls(shard=shard, shards=shards, index=communicator.index(shard), replica=replica, secondary=secondary)


def check_divides(key: str, size: int, ranks: int) -> None:
    """Check that ``ranks`` can be cut into groups of ``size``.

    Raises:
        ShardingError: they cannot; says which sizes, and which numbers of ranks, would do.
    """
    if ranks % size == 0:
        return
    sizes = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
    near = [n for n in (ranks // size * size, (ranks // size + 1) * size) if n]
    raise ShardingError(
        f"{ranks} ranks cannot be cut into groups of {size}",
        where=f"zero.{key}",
        expected=f"a divisor of {ranks}: {sizes}",
        found=str(size),
        remedy=f"set zero.{key} to one of these, or start {' or '.join(map(str, near))} ranks",
    )
