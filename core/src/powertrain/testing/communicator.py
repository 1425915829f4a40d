"""What every communicator must do, as a class of tests.

Each test is a function that every rank runs on its own communicator. Where the
ranks live is the author's choice: in processes, given a function at the top
level of a module that connects one of them::

    def connect(sizes): ...   # reads RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT

    class TestMine(PooledCommunicatorContract):
        factory = staticmethod(connect)

or in threads, by overriding ``on_ranks`` with ``LoopbackWorld(n).run``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from powertrain.roles.communicator import Communicator
from powertrain.testing import collectives
from powertrain.testing.pool import RankPool

Check = Callable[..., Any]


class CommunicatorContract:
    """Tests of one communicator.

    Attributes:
        world_sizes: the numbers of ranks to try, each 2 or more.
        dtypes: the element types that it must carry.
    """

    world_sizes: ClassVar[tuple[int, ...]] = (2, 3)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.uint8,
    )

    def on_ranks(self, n: int, check: Check, *args: Any, sizes: Mapping[str, int] | None = None) -> list[Any]:
        """Run ``check(communicator, *args)`` on ``n`` connected ranks; return the results by rank.

        Args:
            n: how many ranks.
            check: a function of ``powertrain.testing.collectives``.
            args: passed on.
            sizes: ranks along each mesh dimension; all along ``data`` when omitted.
        """
        raise NotImplementedError

    def each(self, check: Check, *args: Any) -> None:
        """Run ``check`` in every world size."""
        for n in self.world_sizes:
            self.on_ranks(n, check, *args)

    def test_knows_its_place(self) -> None:
        """Rank, size and index are those of the mesh, and differ between ranks."""
        for n in self.world_sizes:
            assert self.on_ranks(n, collectives.place) == [(rank, n, rank, n) for rank in range(n)]

    def test_all_reduce_sums(self) -> None:
        """Every rank gets the sum, in the element type that it gave, for every type."""
        self.each(collectives.all_reduce_sums, self.dtypes)

    def test_all_reduce_other_reductions(self) -> None:
        """Mean, maximum and minimum are what they say, not a sum."""
        self.each(collectives.all_reduce_reduces)

    def test_all_reduce_keeps_digits(self) -> None:
        """Nothing is rounded to a narrower type on the way."""
        self.each(collectives.all_reduce_keeps_digits)

    def test_all_reduce_is_the_same_everywhere(self) -> None:
        """The result of a reduction is bit-equal on all ranks, and when repeated."""
        for n in self.world_sizes:
            results = self.on_ranks(n, collectives.all_reduce_random)
            assert all(result == results[0] for result in results)

    def test_all_gather_keeps_the_order(self) -> None:
        """The pieces lie in order of index, for every type, and inputs stay as they are."""
        self.each(collectives.all_gather_orders, self.dtypes)

    def test_reduce_scatter_gives_each_its_piece(self) -> None:
        """Each index gets exactly its own piece of the sum or mean, and inputs stay as they are."""
        self.each(collectives.reduce_scatter_pieces)

    def test_works_in_place(self) -> None:
        """The input of a gather may be the own piece of its output; likewise a reduce-scatter's output of its input."""
        self.each(collectives.in_place, self.dtypes)

    def test_gather_undoes_scatter(self) -> None:
        """All-gather after reduce-scatter is all-reduce, for a length with no factor of two."""
        self.each(collectives.gather_of_scatter)

    def test_all_to_all_exchanges(self) -> None:
        """Piece i goes to index i, and what arrives lies in order of its source."""
        self.each(collectives.all_to_all_exchanges)

    def test_all_to_all_with_uneven_pieces(self) -> None:
        """Pieces may have any length, zero included, along dimension 0."""
        self.each(collectives.all_to_all_uneven)

    def test_broadcast_copies(self) -> None:
        """Every index can be the source."""
        self.each(collectives.broadcast_copies)

    def test_send_and_receive(self) -> None:
        """Messages go round a ring, in order, while every rank sends and receives at once."""
        self.each(collectives.ring)

    def test_barrier_waits_for_all(self, tmp_path: Path) -> None:
        """No rank leaves a barrier before the last one has come."""
        for n in self.world_sizes:
            (directory := tmp_path / str(n)).mkdir()
            self.on_ranks(n, collectives.barrier_waits, str(directory))

    def test_wait_returns_with_the_result(self) -> None:
        """``wait`` does not return before a late rank's part has arrived; waiting twice is harmless."""
        self.each(collectives.wait_means_done)

    def test_several_at_once(self) -> None:
        """Several collectives may be under way, and be waited for in any order."""
        self.each(collectives.several_in_flight)

    def test_together_is_as_one_by_one(self) -> None:
        """Collectives issued together give what they give alone."""
        self.each(collectives.together)

    def test_allocates(self) -> None:
        """``empty`` returns flat, contiguous memory on the device that collectives accept."""
        self.each(collectives.allocated_memory_works, self.dtypes)

    def test_large_tensors(self) -> None:
        """A tensor of more than a million elements arrives whole."""
        self.each(collectives.large)

    def test_gathers_json(self) -> None:
        """Values of different lengths come back in order of index."""
        self.each(collectives.json_values)

    def test_dimensions_are_separate(self) -> None:
        """A collective along one dimension of a mesh involves the peers along it only."""
        self.on_ranks(4, collectives.dimensions, sizes={"data": 2, "tensor": 2})

    def test_splits_a_dimension(self) -> None:
        """A dimension cut into groups joins, by either name, exactly the ranks it should, in every operation."""
        self.on_ranks(4, collectives.splits)

    def test_splits_on_a_mesh(self) -> None:
        """The world and each dimension of a mesh of several can be cut."""
        self.on_ranks(4, collectives.splits_the_world, sizes={"data": 2, "tensor": 2})

    def test_describes_itself(self) -> None:
        """``describe`` speaks in strings."""
        self.each(collectives.describes)


class PooledCommunicatorContract(CommunicatorContract):
    """The contract over processes, for a communicator that ``factory`` connects.

    Attributes:
        factory: a function at the top level of a module; ``factory(sizes)``
            returns this process's communicator for a mesh of those sizes.
    """

    factory: ClassVar[Callable[[Mapping[str, int] | None], Communicator]]
    _pool: RankPool

    @pytest.fixture(autouse=True)
    def _take_pool(self, ranks: RankPool) -> None:
        self._pool = ranks

    def connector(self) -> Callable[[Mapping[str, int] | None], Communicator]:
        """Return what connects one process; it is pickled."""
        return type(self).factory

    def on_ranks(self, n: int, check: Check, *args: Any, sizes: Mapping[str, int] | None = None) -> list[Any]:
        """Run ``check`` on the processes of the pool."""
        return self._pool(n, collectives.connected, self.connector(), sizes, check, args)
