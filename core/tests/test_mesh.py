"""The mesh: arithmetic on which every rank agrees."""

from __future__ import annotations

import itertools
import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powertrain.errors import LaunchError
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
