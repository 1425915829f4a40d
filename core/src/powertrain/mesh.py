"""The ranks of a run as a grid of named dimensions.

A mesh is arithmetic only: it starts no process group and needs no peers, so a
1,024-rank layout can be built and checked in one process. Communicators make
their groups from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs

from powertrain.errors import LaunchError

DIMENSIONS = ("pipe", "data", "sequence", "expert", "tensor")
"""Slowest to fastest varying: neighbours in the last dimension are neighbours on a host."""

WORLD = "world"
"""The name that stands for every rank at once."""


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
            raise LaunchError(f"no mesh dimension is called {unknown[0]!r}", expected=", ".join(DIMENSIONS))
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

    def size(self, dimension: str) -> int:
        """Return how many ranks lie along ``dimension``."""
        return self.world_size if dimension == WORLD else self.sizes[dimension]

    def index(self, dimension: str) -> int:
        """Return this rank's coordinate along ``dimension``."""
        if dimension == WORLD:
            return self.rank
        return (self.rank // self._stride(dimension)) % self.sizes[dimension]

    def peers(self, dimension: str) -> tuple[int, ...]:
        """Return the global ranks that share a group with this rank along ``dimension``."""
        if dimension == WORLD:
            return tuple(range(self.world_size))
        stride = self._stride(dimension)
        first = self.rank - self.index(dimension) * stride
        return tuple(first + i * stride for i in range(self.sizes[dimension]))

    def groups(self, dimension: str) -> list[tuple[int, ...]]:
        """Return every group along ``dimension``, in an order that all ranks share."""
        seen = {attrs.evolve(self, rank=rank).peers(dimension) for rank in range(self.world_size)}
        return sorted(seen)

    def _stride(self, dimension: str) -> int:
        after = DIMENSIONS[DIMENSIONS.index(dimension) + 1 :]
        return math.prod(self.sizes[name] for name in after)
