"""The ranks of a run as a grid of named dimensions.

A mesh is arithmetic only: it starts no process group and needs no peers, so a
1,024-rank layout can be built and checked in one process. Communicators make
their groups from it.

A dimension may be cut further: ``data.within4`` are the groups of 4 neighbours
along ``data``, and ``data.across4`` joins what stands at the same place in each
of these groups. Such names are arithmetic as well; the mesh keeps none of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import attrs

from powertrain.errors import LaunchError, ShardingError

DIMENSIONS = ("pipe", "data", "sequence", "expert", "tensor")
"""Slowest to fastest varying: neighbours in the last dimension are neighbours on a host."""

WORLD = "world"
"""The name that stands for every rank at once."""

DERIVED = re.compile(r"(.+)\.(within|across)(\d+)")
"""Names that ``Mesh.split`` makes: the dimension that was cut, which half of it, and the ranks of a group."""


@attrs.frozen
class Mesh:
    """Where one rank stands among all.

    Attributes:
        sizes: ranks along each of ``DIMENSIONS``; their product is the world size.
        rank: this process's global rank, in row-major order of ``DIMENSIONS``.
    """

    sizes: Mapping[str, int]
    rank: int

    @classmethod
    def build(cls, world_size: int, rank: int, sizes: Mapping[str, int] | None = None) -> Mesh:
        """Make a mesh of ``world_size`` ranks; the data dimension takes what is left.

        Raises:
            LaunchError: the sizes do not multiply to the world size.
        """
        given = dict(sizes or {})
        if unknown := sorted(set(given) - set(DIMENSIONS)):
            raise LaunchError(
                f"no mesh dimension is called {unknown[0]!r}",
                expected=", ".join(DIMENSIONS),
                remedy="name one of these",
            )
        others = math.prod(size for name, size in given.items() if name != "data")
        data = given.get("data", world_size // others if others else 0)
        full = {name: data if name == "data" else given.get(name, 1) for name in DIMENSIONS}
        if math.prod(full.values()) != world_size:
            product = " x ".join(f"{name} {size}" for name, size in full.items() if size != 1) or "1"
            raise LaunchError(
                f"the mesh does not fit {world_size} ranks",
                expected=f"a product of {world_size}",
                found=f"{product} = {math.prod(full.values())}",
                remedy="change the sizes, or start another number of ranks",
            )
        return cls(full, rank)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return math.prod(self.sizes.values())

    def split(self, dimension: str, size: int) -> tuple[str, str]:
        """Return the names of the two dimensions into which groups of ``size`` neighbours cut ``dimension``.

        Args:
            dimension: one of ``DIMENSIONS``, ``"world"``, or a name that this method returned.
            size: neighbouring ranks in a group.

        Returns:
            ``within``, which has ``size`` ranks: those of one group; and ``across``, which has
            ``size(dimension) // size``: those at the same place of every group. This rank's indices along
            them are the remainder and the quotient of ``index(dimension)`` by ``size``.

        Raises:
            ShardingError: the groups do not come out even.
        """
        ranks = self.size(dimension)
        if size < 1 or ranks % size:
            raise ShardingError(
                f"the {ranks} ranks along {dimension!r} cannot be cut into groups of {size}",
                expected="one of " + ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0),
                found=str(size),
                remedy="choose one of these sizes, or start another number of ranks",
            )
        return f"{dimension}.within{size}", f"{dimension}.across{size}"

    def size(self, dimension: str) -> int:
        """Return how many ranks lie along ``dimension``."""
        return self._line(dimension)[1]

    def index(self, dimension: str) -> int:
        """Return this rank's coordinate along ``dimension``."""
        stride, size = self._line(dimension)
        return self.rank // stride % size

    def peers(self, dimension: str) -> tuple[int, ...]:
        """Return the global ranks that share a group with this rank along ``dimension``."""
        return self._peers(self.rank, *self._line(dimension))

    def groups(self, dimension: str) -> list[tuple[int, ...]]:
        """Return every group along ``dimension``, in an order that all ranks share."""
        stride, size = self._line(dimension)
        firsts = (rank for rank in range(self.world_size) if rank // stride % size == 0)
        return [self._peers(first, stride, size) for first in firsts]

    def _line(self, dimension: str) -> tuple[int, int]:
        """Return the distance between neighbours along ``dimension``, in ranks, and how many there are.

        Raises:
            LaunchError: there is no such dimension.
            ShardingError: the name is derived, and its groups do not come out even.
        """
        if dimension in self.sizes:
            after = DIMENSIONS[DIMENSIONS.index(dimension) + 1 :]
            return math.prod(self.sizes[name] for name in after), self.sizes[dimension]
        if dimension == WORLD:
            return 1, self.world_size
        derived = DERIVED.fullmatch(dimension)
        if derived is None:
            raise LaunchError(
                f"no mesh dimension is called {dimension!r}",
                expected=", ".join((*DIMENSIONS, WORLD)) + ", or a name that `split` returned",
                remedy="name one of these",
            )
        parent, half, count = derived[1], derived[2], int(derived[3])
        self.split(parent, count)
        stride, size = self._line(parent)
        return (stride, count) if half == "within" else (stride * count, size // count)

    @staticmethod
    def _peers(rank: int, stride: int, size: int) -> tuple[int, ...]:
        first = rank - rank // stride % size * stride
        return tuple(range(first, first + size * stride, stride))
