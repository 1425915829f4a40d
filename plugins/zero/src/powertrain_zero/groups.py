"""Over which ranks state is sharded, and over which it is replicated."""

from __future__ import annotations

from collections import Counter

import attrs

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
        config.check_ranks(ranks)
        if config.shard_group is not None and config.shard_group != ranks:
            shard, replica = communicator.split("data", config.shard_group)
        secondary = None
        shards = communicator.size(shard)
        if config.kept is not None and config.kept[1] != shards:
            # Shard groups are neighbours as well: within one of them these are its own parts.
            secondary, _ = communicator.split("data", config.kept[1])
        return cls(shard=shard, shards=shards, index=communicator.index(shard), replica=replica, secondary=secondary)


def hops(config: ZeroConfig, groups: Groups, communicator: Communicator, local_size: int) -> tuple[str, ...]:
    """Return the dimensions of a reduction in hops: within and across nodes, or one; called on every rank.

    Args:
        config: ``node`` says how many neighbouring shards are one node.
        groups: over which ranks is reduced.
        communicator: connects them.
        local_size: how many ranks this host runs; counts where ``node`` is absent. Where hosts and
            shards do not come out even, all shards are one node.
    """
    node = config.node
    if node is None:
        node = _shards_on_a_host(groups, communicator, local_size)
    if node in (1, groups.shards):
        return (groups.shard,)
    return communicator.split(groups.shard, node)


def _shards_on_a_host(groups: Groups, communicator: Communicator, local_size: int) -> int:
    """Return how many ranks along the shards each host runs; all of them where hosts differ."""
    local_sizes = communicator.gather_json(local_size, label="ranks on each host")
    if len(set(local_sizes)) > 1:
        return groups.shards
    # Neighbours along the shards need not be neighbours on the host: other dimensions lie between.
    counts = {
        count
        for ranks in communicator.mesh.groups(groups.shard)
        for count in Counter(rank // local_size for rank in ranks).values()
    }
    return counts.pop() if len(counts) == 1 else groups.shards
