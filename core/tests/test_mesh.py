"""The mesh: arithmetic on which every rank agrees."""

from __future__ import annotations

import itertools
import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powertrain.errors import LaunchError, ShardingError
from powertrain.mesh import DIMENSIONS, WORLD, Mesh

sizes = st.fixed_dictionaries({name: st.integers(1, 3) for name in DIMENSIONS})
dimensions = st.sampled_from([*DIMENSIONS, WORLD])


def world(given_sizes: dict[str, int]) -> list[Mesh]:
    """Return the mesh as each rank sees it."""
    count = math.prod(given_sizes.values())
    return [Mesh.build(count, rank, given_sizes) for rank in range(count)]


@given(sizes)
def test_ranks_are_in_row_major_order(given_sizes: dict[str, int]) -> None:
    """Rank r has the r-th coordinates, the last dimension varying fastest."""
    coordinates = list(itertools.product(*(range(given_sizes[name]) for name in DIMENSIONS)))
    assert [tuple(mesh.index(name) for name in DIMENSIONS) for mesh in world(given_sizes)] == coordinates


@given(sizes, dimensions)
def test_groups_partition_the_world(given_sizes: dict[str, int], dimension: str) -> None:
    """Every rank is in exactly one group along a dimension, and each group has that dimension's size."""
    meshes = world(given_sizes)
    groups = meshes[0].groups(dimension)
    assert sorted(rank for group in groups for rank in group) == list(range(len(meshes)))
    assert {len(group) for group in groups} == {meshes[0].size(dimension)}


@given(sizes, dimensions)
def test_ranks_agree_on_their_groups(given_sizes: dict[str, int], dimension: str) -> None:
    """Each rank stands in its own group at its own index, and all list the same groups in the same order."""
    meshes = world(given_sizes)
    groups = meshes[0].groups(dimension)
    for mesh in meshes:
        assert mesh.peers(dimension)[mesh.index(dimension)] == mesh.rank
        assert mesh.peers(dimension) in groups
    assert meshes[-1].groups(dimension) == groups == sorted(groups)


def divisors(number: int) -> list[int]:
    """Return what divides ``number``."""
    return [size for size in range(1, number + 1) if number % size == 0]


@given(sizes, dimensions, st.data())
def test_a_dimension_is_cut_into_neighbours(given_sizes: dict[str, int], dimension: str, data: st.DataObject) -> None:
    """Along the two names lie the remainder and the quotient of the index; the groups are those of the dimension."""
    meshes = world(given_sizes)
    whole = meshes[0].size(dimension)
    size = data.draw(st.sampled_from(divisors(whole)))
    within, across = meshes[0].split(dimension, size)
    assert (within, across) == (f"{dimension}.within{size}", f"{dimension}.across{size}")
    for mesh in meshes:
        assert (mesh.size(within), mesh.size(across)) == (size, whole // size)
        assert mesh.index(within) == mesh.index(dimension) % size
        assert mesh.index(across) == mesh.index(dimension) // size
        peers, me = mesh.peers(dimension), mesh.index(dimension)
        assert mesh.peers(within) == peers[me // size * size : (me // size + 1) * size]
        assert mesh.peers(across) == peers[me % size :: size]
    for name in (within, across):
        groups = meshes[0].groups(name)
        assert meshes[-1].groups(name) == groups == sorted(groups)
        assert sorted(rank for group in groups for rank in group) == list(range(len(meshes)))
        assert all(mesh.peers(name) in groups for mesh in meshes)


@pytest.mark.parametrize("dimension", ["data", "tensor", WORLD])
def test_a_dimension_cut_into_ones_or_not_at_all(dimension: str) -> None:
    """Groups of one leave each rank alone, and a group of all is the dimension itself."""
    for mesh in world({"data": 4, "tensor": 2}):
        whole = mesh.peers(dimension)
        within, across = mesh.split(dimension, 1)
        assert (mesh.peers(within), mesh.peers(across)) == ((mesh.rank,), whole)
        within, across = mesh.split(dimension, len(whole))
        assert (mesh.peers(within), mesh.peers(across)) == (whole, (mesh.rank,))


def test_what_is_cut_can_be_cut_again() -> None:
    """A derived name is a dimension like any other: 12 ranks are 2 x 3 x 2."""
    mesh = Mesh.build(12, 7)
    inner, outer = mesh.split("data", 6)
    pairs, triples = mesh.split(inner, 2)
    assert mesh.peers(outer) == (1, 7)
    assert mesh.peers(pairs) == (6, 7)
    assert mesh.peers(triples) == (7, 9, 11)
    assert [mesh.index(name) for name in (outer, triples, pairs)] == [1, 0, 1]


@pytest.mark.parametrize("size", [5, 0, -2, 24])
def test_groups_that_do_not_come_out_even_are_refused(size: int) -> None:
    """Sizes that do not divide are a ShardingError with those that do, by ``split`` and by name."""
    mesh = Mesh.build(24, 3, {"tensor": 2})
    with pytest.raises(ShardingError, match=f"12 ranks along 'data' cannot be cut into groups of {size}") as caught:
        mesh.split("data", size)
    assert caught.value.code == "PT460"
    assert caught.value.expected == "one of 1, 2, 3, 4, 6, 12"
    if size >= 0:
        with pytest.raises(ShardingError, match=f"groups of {size}"):
            mesh.peers(f"data.within{size}")


@pytest.mark.parametrize("name", ["model", "data.within", "data.inside2", "model.within1", "", "data.across2x"])
def test_a_name_that_means_nothing_is_refused(name: str) -> None:
    """Asking for a dimension that does not exist is a LaunchError that lists those that do."""
    mesh = Mesh.build(4, 0)
    for ask in (mesh.size, mesh.index, mesh.peers, mesh.groups):
        with pytest.raises(LaunchError, match="no mesh dimension is called") as caught:
            ask(name)
        assert "tensor, world" in (caught.value.expected or "")


def test_the_data_dimension_takes_what_is_left() -> None:
    """Sizes that are not given are 1, and the data dimension is the rest of the world."""
    mesh = Mesh.build(24, 0, {"tensor": 2, "pipe": 3})
    assert dict(mesh.sizes) == {"pipe": 3, "data": 4, "sequence": 1, "expert": 1, "tensor": 2}
    assert mesh.world_size == mesh.size(WORLD) == 24


def test_a_thousand_ranks_fit_one_process() -> None:
    """A mesh of 1,024 ranks is made and asked without a process or a connection."""
    mesh = Mesh.build(1024, 777, {"tensor": 8, "pipe": 4})
    assert [mesh.index(name) for name in DIMENSIONS] == [3, 1, 0, 0, 1]
    assert mesh.peers("tensor") == tuple(range(776, 784))
    groups = {name: mesh.groups(name) for name in (*DIMENSIONS, WORLD)}
    assert {name: len(found) for name, found in groups.items()} == {
        "pipe": 256,
        "data": 32,
        "sequence": 1024,
        "expert": 1024,
        "tensor": 128,
        WORLD: 1,
    }


@pytest.mark.parametrize(
    ("given_sizes", "says"),
    [
        ({"tensor": 3}, ["does not fit 8 ranks", "data 2 x tensor 3 = 6", "a product of 8"]),
        ({"data": 4}, ["does not fit 8 ranks", "data 4 = 4"]),
        ({"tensor": 16}, ["does not fit 8 ranks", "data 0 x tensor 16 = 0"]),
        ({"tensor": 0}, ["does not fit 8 ranks"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given_sizes: dict[str, int], says: list[str]) -> None:
    """Sizes that do not multiply to the world size are a LaunchError with the arithmetic."""
    with pytest.raises(LaunchError) as caught:
        Mesh.build(8, 0, given_sizes)
    assert caught.value.code == "PT310"
    assert all(text in str(caught.value) for text in says)


def test_an_unknown_dimension_is_refused() -> None:
    """A dimension that does not exist is a LaunchError that lists those that do."""
    with pytest.raises(LaunchError, match="no mesh dimension is called 'model'") as caught:
        Mesh.build(8, 0, {"model": 2})
    assert caught.value.expected == ", ".join(DIMENSIONS)


def test_a_mesh_cannot_be_changed() -> None:
    """A mesh is a value: assigning to it fails."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Mesh.build(2, 0).rank = 1  # type: ignore[misc]
