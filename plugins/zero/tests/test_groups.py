"""Which dimensions a [zero] table makes of the data ranks, and what it says of sizes that do not come out even."""

from __future__ import annotations

from typing import Any

import pytest

from powertrain.errors import ShardingError
from powertrain.roles.communicator import Communicator
from powertrain.testing.loopback import LoopbackWorld
from powertrain_zero.config import ZeroConfig
from powertrain_zero.groups import Groups, hops
from powertrain_zero.plugin import ZeroPlugin


def build(ranks: int, rank: int = 0, **table: Any) -> Groups:
    return Groups.build(ZeroConfig(stage=3, **table), LoopbackWorld(ranks).communicators[rank])


def test_shards_over_all_by_default() -> None:
    """Without a size, or with that of the whole dimension, there is one copy, over all data ranks."""
    for table in ({}, {"shard_group": 8}, {"secondary": 8}, {"reshard_after_forward": 8}):
        assert build(8, 5, **table) == Groups(shard="data", shards=8, index=5)


def test_shards_within_groups_and_replicas_across() -> None:
    """Neighbours share one copy; those at the same place of each group hold the same shard."""
    world = LoopbackWorld(8)
    groups = [Groups.build(ZeroConfig(stage=3, shard_group=4), c) for c in world.communicators]
    assert [g.index for g in groups] == [0, 1, 2, 3] * 2
    mesh = world.communicators[6].mesh
    assert mesh.peers(groups[6].shard) == (4, 5, 6, 7)
    assert groups[6].replica is not None
    assert mesh.peers(groups[6].replica) == (2, 6)


def test_a_second_slice_lies_within_the_first() -> None:
    """What backward gathers along are neighbours of one shard group."""
    for table in ({"secondary": 2}, {"reshard_after_forward": 2}, {"secondary": 2, "shard_group": 4}):
        world = LoopbackWorld(8)
        groups = Groups.build(ZeroConfig(stage=3, **table), world.communicators[6])  # type: ignore[arg-type]
        mesh = world.communicators[6].mesh
        assert groups.secondary is not None
        assert mesh.peers(groups.secondary) == (6, 7)
        assert set(mesh.peers(groups.secondary)) <= set(mesh.peers(groups.shard))


@pytest.mark.parametrize(
    ("table", "where", "expected", "remedy"),
    [
        ({"shard_group": 3}, "zero.shard_group", "1, 2, 4, 8", "6 or 9 ranks"),
        ({"shard_group": 16}, "zero.shard_group", "1, 2, 4, 8", "16 ranks"),
        ({"secondary": 5}, "zero.secondary", "1, 2, 4, 8", "5 or 10 ranks"),
        ({"reshard_after_forward": 6}, "zero.reshard_after_forward", "1, 2, 4, 8", "6 or 12 ranks"),
        ({"shard_group": 4, "secondary": 3}, "zero.secondary", "1, 2, 4", "zero.shard_group to 3 or 6"),
        ({"shard_group": 4, "secondary": 8}, "zero.secondary", "1, 2, 4", "zero.shard_group to 8"),
    ],
)
def test_sizes_that_do_not_come_out_even(table: dict[str, Any], where: str, expected: str, remedy: str) -> None:
    """The error names the key, the sizes that would do, and what else could be changed."""
    with pytest.raises(ShardingError) as caught:
        build(8, **table)
    for part in (where, expected, remedy):
        assert part in str(caught.value)


def find_hops(
    ranks: int, local_size: int | list[int], sizes: dict[str, int] | None = None, **table: Any
) -> list[tuple[int, ...]]:
    """Return with whom the last rank exchanges in each hop; all ranks make the same hops."""

    def find(communicator: Communicator) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
        config = ZeroConfig(stage=2, reduce="int8", **table)
        local = local_size if isinstance(local_size, int) else local_size[communicator.rank]
        dimensions = hops(config, Groups.build(config, communicator), communicator, local)
        return dimensions, [communicator.mesh.peers(dimension) for dimension in dimensions]

    results = LoopbackWorld(ranks, sizes).run(find)
    assert len({dimensions for dimensions, _ in results}) == 1
    return results[-1][1]


def test_hops_within_and_across_nodes() -> None:
    """What the launcher says of hosts, or ``node``, cuts a reduction into two hops; one host is one hop."""
    all_of_them = tuple(range(8))
    two = [(4, 5, 6, 7), (3, 7)]
    assert find_hops(8, 4) == two
    assert find_hops(8, 8, node=4) == two
    assert find_hops(8, 8) == [all_of_them]
    assert find_hops(8, 1) == [all_of_them]
    assert find_hops(8, 4, node=8) == [all_of_them]
    assert find_hops(8, 2, shard_group=4) == [(6, 7), (5, 7)]
    assert find_hops(8, 8, shard_group=4) == [(4, 5, 6, 7)]
    assert find_hops(9, 6) == [tuple(range(9))], "hosts that do not come out even are one"
    assert find_hops(6, [4, 4, 4, 4, 2, 2]) == [tuple(range(6))]
    assert find_hops(8, 4, {"tensor": 2}) == [(5, 7), (3, 7)], "two data ranks lie on a host of four"


def test_nodes_that_do_not_come_out_even() -> None:
    """A size that was asked for is not dropped in silence."""
    with pytest.raises(ShardingError, match=r"zero\.node"):
        find_hops(8, 4, node=3)


def test_groups_are_checked_before_a_run() -> None:
    """``powertrain config check --ranks`` asks the plugin, which needs no ranks to say that they do not divide."""
    table = ZeroConfig(stage=3, shard_group=4, secondary=2)
    for ranks in (4, 8):
        ZeroPlugin.check_ranks(table, ranks)
    for ranks, key in ((6, "shard_group"), (2, "shard_group")):
        with pytest.raises(ShardingError, match=f"zero.{key}"):
            ZeroPlugin.check_ranks(table, ranks)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"stage": 2, "gather": "int8"}, "gather needs stage = 3"),
        ({"stage": 2, "secondary": 2}, "secondary needs stage = 3"),
        ({"stage": 1, "reshard_after_forward": 2}, "reshard_after_forward needs stage = 3"),
        ({"stage": 3, "secondary": 2, "reshard_after_forward": 4}, "leave one out"),
        ({"stage": 3, "secondary": 2, "reshard_after_forward": False}, "leave one out"),
        ({"stage": 2, "node": 2}, "node needs reduce"),
        ({"stage": 2, "shard_group": 1, "reduce": "int4"}, "reduce has no effect"),
        ({"stage": 3, "shard_group": 1, "gather": "int8"}, "gather has no effect"),
        ({"stage": 3, "shard_group": 1, "secondary": 1}, "secondary has no effect"),
    ],
)
def test_tables_that_contradict_themselves(table: dict[str, Any], says: str) -> None:
    """A key that could do nothing is refused."""
    with pytest.raises(ValueError, match=says):
        ZeroConfig(**table)
