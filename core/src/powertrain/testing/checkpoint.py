"""What every checkpoint store must do, as a class of tests.

Ranks are threads of one process that share a directory; a store that needs
processes overrides ``on_ranks``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from powertrain.errors import CheckpointError, CheckpointMissing
from powertrain.layout import Box
from powertrain.roles.checkpoint import CheckpointStore, Snapshot, TensorSlice
from powertrain.roles.communicator import Communicator
from powertrain.testing.capability import needs
from powertrain.testing.loopback import LoopbackWorld
from powertrain.testing.slices import DTYPES, SHAPES, content, matches, own, snapshot


class CheckpointStoreContract:
    """Tests of one store.

    Attributes:
        keeps_files: whether it keeps checkpoints as files under its directory.
    """

    keeps_files: ClassVar[bool] = True

    def make(self, directory: Path, communicator: Communicator) -> CheckpointStore:
        """Return one rank's store of ``directory``."""
        raise NotImplementedError

    def on_ranks(self, n: int, directory: Path, body: Callable[[CheckpointStore, Communicator], Any]) -> list[Any]:
        """Run ``body(store, communicator)`` on ``n`` ranks, and close their stores."""

        def run(communicator: Communicator) -> Any:
            store = self.make(directory, communicator)
            try:
                return body(store, communicator)
            finally:
                store.close()

        return LoopbackWorld(n).run(run)

    def save(self, n: int, directory: Path, tag: str = "first", *, plus: int = 0) -> None:
        """Save one checkpoint on ``n`` ranks."""
        self.on_ranks(n, directory, lambda store, communicator: store.save(tag, snapshot(communicator, plus=plus)))

    def load(self, n: int, directory: Path, tag: str | None = None, *, plus: int = 0) -> None:
        """Load it on ``n`` ranks and compare every element."""

        def body(store: CheckpointStore, communicator: Communicator) -> None:
            slices = own(communicator, fill=False)
            store.open(tag).read(slices)
            matches(slices, plus=plus)

        self.on_ranks(n, directory, body)

    def refuses(self, directory: Path, tag: str | None) -> None:
        """Assert that there is nothing to open."""
        with pytest.raises(CheckpointMissing):
            self.on_ranks(1, directory, lambda store, _: store.open(tag))

    @pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 3), (3, 1), (2, 3)])
    def test_loads_on_any_number_of_ranks(self, tmp_path: Path, before: int, after: int) -> None:
        """Odd flat slices saved by one number of ranks are bit-equal when loaded by another."""
        self.save(before, tmp_path)
        self.load(after, tmp_path)

    def test_keeps_element_types(self, tmp_path: Path) -> None:
        """Every element type comes back as it was, and is listed."""

        def body(store: CheckpointStore, _: Communicator) -> None:
            wholes = {f"model/{dtype}": content("model/row", dtype) for dtype in DTYPES}
            pieces = [TensorSlice(name, (11,), tensor.clone()) for name, tensor in wholes.items()]
            store.save("types", Snapshot(tensors=pieces, values={}, rank_values={}))
            reader = store.open("types")
            for name, whole in wholes.items():
                assert reader.tensors[name].dtype == whole.dtype, f"{name} is listed as {reader.tensors[name].dtype}"
                empty = torch.zeros_like(whole)
                reader.read([TensorSlice(name, (11,), empty)])
                assert torch.equal(empty, whole)

        self.on_ranks(1, tmp_path, body)

    def test_converts_on_reading(self, tmp_path: Path) -> None:
        """A slice of another element type is filled with converted values."""
        self.save(1, tmp_path)

        def body(store: CheckpointStore, _: Communicator) -> None:
            half = torch.zeros(11, dtype=torch.bfloat16)
            store.open().read([TensorSlice("model/row", (11,), half)])
            assert torch.equal(half, content("model/row", torch.bfloat16))

        self.on_ranks(1, tmp_path, body)

    def test_lists_tensors_and_values(self, tmp_path: Path) -> None:
        """Names, shapes, common values and each rank's own come back."""
        self.save(2, tmp_path)

        def body(store: CheckpointStore, _: Communicator) -> None:
            reader = store.open()
            assert reader.tag == "first"
            assert {name: tuple(info.shape) for name, info in reader.tensors.items()} == SHAPES
            assert reader.values == {"step": 10, "nested": {"list": [1, 2.5, None, True, "ä"]}}
            assert list(reader.rank_values) == [{"rank": 0}, {"rank": 1}]

        self.on_ranks(3, tmp_path, body)

    def test_reads_any_part(self, tmp_path: Path) -> None:
        """Any flat slice, also of a block of the tensor, can be read by itself."""
        self.save(2, tmp_path)
        whole = content("model/odd")
        block = Box((2, 1, 0), (4, 3, 3))
        inside = whole[2:6, 1:4, 0:3].reshape(-1)

        def body(store: CheckpointStore, _: Communicator) -> None:
            flat, part = torch.zeros(40), torch.zeros(20)
            store.open().read(
                [
                    TensorSlice("model/odd", (7, 5, 3), flat, 33),
                    TensorSlice("model/odd", (7, 5, 3), part, 7, block),
                ]
            )
            assert torch.equal(flat, whole.reshape(-1)[33:73])
            assert torch.equal(part, inside[7:27])

        self.on_ranks(1, tmp_path, body)

    def test_saves_blocks(self, tmp_path: Path) -> None:
        """Ranks that hold different blocks of a tensor save one whole tensor."""
        whole = content("model/odd")

        def save(store: CheckpointStore, communicator: Communicator) -> None:
            columns = slice(0, 2) if communicator.rank == 0 else slice(2, 5)
            box = Box((0, columns.start, 0), (7, columns.stop - columns.start, 3))
            piece = TensorSlice("model/odd", (7, 5, 3), whole[:, columns].reshape(-1).clone(), 0, box)
            store.save("blocks", Snapshot(tensors=[piece], values={}, rank_values={}))

        def load(store: CheckpointStore, _: Communicator) -> None:
            flat = torch.zeros(105)
            store.open("blocks").read([TensorSlice("model/odd", (7, 5, 3), flat)])
            assert torch.equal(flat, whole.reshape(-1))

        self.on_ranks(2, tmp_path, save)
        self.on_ranks(1, tmp_path, load)

    def test_replicas_are_one_tensor(self, tmp_path: Path) -> None:
        """A tensor that every rank gives whole is saved, and loads, once."""

        def body(store: CheckpointStore, _: Communicator) -> None:
            piece = TensorSlice("model/row", (11,), content("model/row"))
            store.save("replicas", Snapshot(tensors=[piece], values={}, rank_values={}))
            found = torch.zeros(11)
            store.open("replicas").read([TensorSlice("model/row", (11,), found)])
            assert torch.equal(found, content("model/row"))

        self.on_ranks(2, tmp_path, body)

    def test_tags_are_in_order(self, tmp_path: Path) -> None:
        """Tags are listed oldest first, and the newest opens by default."""
        for plus, tag in enumerate(["b", "c", "a"]):
            self.save(2, tmp_path, tag, plus=plus)
        assert self.on_ranks(2, tmp_path, lambda store, _: store.tags()) == [["b", "c", "a"]] * 2
        self.load(2, tmp_path, plus=2)
        self.load(1, tmp_path, "c", plus=1)

    def test_prunes_the_oldest(self, tmp_path: Path) -> None:
        """``prune`` leaves the newest, and they load."""
        for plus, tag in enumerate(["one", "two", "three"]):
            self.save(1, tmp_path, tag, plus=plus)
        self.on_ranks(2, tmp_path, lambda store, _: store.prune(2))
        assert self.on_ranks(1, tmp_path, lambda store, _: store.tags()) == [["two", "three"]]
        self.load(1, tmp_path, "two", plus=1)

    def test_prunes_what_matches(self, tmp_path: Path) -> None:
        """With a pattern, ``prune`` leaves every checkpoint whose whole tag does not match it."""
        for tag in ["auto-1", "mine-auto-1", "auto-2", "auto-2-mine", "auto-3"]:
            self.save(1, tmp_path, tag)
        self.on_ranks(2, tmp_path, lambda store, _: store.prune(1, r"auto-\d"))
        kept = ["mine-auto-1", "auto-2-mine", "auto-3"]
        assert self.on_ranks(1, tmp_path, lambda store, _: store.tags()) == [kept]

    def test_missing_checkpoints_are_an_error(self, tmp_path: Path) -> None:
        """An empty place has no tags; opening it, or an unknown tag, is CheckpointMissing."""
        assert self.on_ranks(1, tmp_path / "nothing", lambda store, _: store.tags()) == [[]]
        for tag in (None, "unknown"):
            self.refuses(tmp_path / "nothing", tag)
        self.save(1, tmp_path)
        self.refuses(tmp_path, "unknown")

    @pytest.mark.parametrize(("name", "shape"), [("model/unknown", (11,)), ("model/row", (12,))])
    def test_what_is_not_in_it_is_an_error(self, tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
        """Reading an unknown name, or another shape, is a CheckpointError."""
        self.save(1, tmp_path)
        piece = TensorSlice(name, shape, torch.zeros(shape))
        with pytest.raises(CheckpointError):
            self.on_ranks(1, tmp_path, lambda store, _: store.open().read([piece]))

    def test_is_visible_only_when_whole(self, tmp_path: Path) -> None:
        """As long as one rank has not handed over its part, no tag is listed."""

        def body(store: CheckpointStore, communicator: Communicator) -> None:
            if communicator.rank == 1:
                time.sleep(0.15)  # the other rank is in save by now
                alone = LoopbackWorld(1).communicators[0]
                assert self.make(tmp_path, alone).tags() == [], "half a checkpoint is visible"
            store.save("whole", snapshot(communicator))
            assert store.tags() == ["whole"]

        self.on_ranks(2, tmp_path, body)

    def test_a_failed_save_is_not_visible(self, tmp_path: Path) -> None:
        """Values that are not JSON fail the save on every rank, and leave nothing to load."""

        def body(store: CheckpointStore, communicator: Communicator) -> list[str]:
            given = snapshot(communicator)
            bad = {"rank": object()} if communicator.rank == 1 else {"rank": 0}
            with pytest.raises(CheckpointError):
                store.save("bad", Snapshot(tensors=given.tensors, values=given.values, rank_values=bad))
            return store.tags()

        assert self.on_ranks(2, tmp_path, body) == [[], []]

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_common_values_must_be_common(self, tmp_path: Path, asynchronous: bool) -> None:
        """``values`` that are not JSON on one rank, or differ between ranks, fail the save on every rank."""

        def body(store: CheckpointStore, communicator: Communicator) -> list[str]:
            given, first = snapshot(communicator), communicator.rank == 0
            for bad in ({"step": 1 if first else 2}, {"step": 1 if first else object()}, {"step": 1} if first else {}):
                wrong = Snapshot(tensors=given.tensors, values=bad, rank_values={})
                with pytest.raises(CheckpointError):
                    store.save("bad", wrong, asynchronous=asynchronous)
                    store.wait()
            return store.tags()

        assert self.on_ranks(2, tmp_path, body) == [[], []]

    def test_saves_are_told_once(self, tmp_path: Path) -> None:
        """``poll`` tells the tags of synchronous saves too, oldest first, and each of them once."""

        def body(store: CheckpointStore, communicator: Communicator) -> list[list[str]]:
            store.save("first", snapshot(communicator))
            store.save("second", snapshot(communicator))
            store.prune(1)
            return [store.poll(), store.poll(), store.wait()]

        assert self.on_ranks(2, tmp_path, body) == [[["first", "second"], [], []]] * 2

    def test_asynchronous_saves_take_a_copy(self, tmp_path: Path) -> None:
        """Once an asynchronous save returns, tensors may change; ``wait`` tells its tag, once."""

        def body(store: CheckpointStore, communicator: Communicator) -> None:
            given = snapshot(communicator)
            store.save("later", given, asynchronous=True)
            for piece in given.tensors:
                piece.tensor.fill_(-1)
            assert store.poll() + store.wait() == ["later"]
            assert store.poll() == []

        self.on_ranks(2, tmp_path, body)
        self.load(1, tmp_path, "later")

    @pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
    def test_damage_is_never_loaded(self, tmp_path: Path, damage: str) -> None:
        """A file with a flipped byte, cut in half or gone is a CheckpointError, never other numbers."""
        needs(self.keeps_files, "it keeps no files")
        self.save(2, tmp_path)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert files, "no file under the store's directory"
        for path in files:
            whole = path.read_bytes()
            middle = len(whole) // 2
            if damage == "delete":
                path.unlink()
            elif damage == "truncate":
                path.write_bytes(whole[:middle])
            else:
                path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0x10]) + whole[middle + 1 :] if whole else b"")
            try:
                self.load(1, tmp_path, "first")
            except CheckpointError:
                pass
            finally:
                path.write_bytes(whole)
        self.load(1, tmp_path, "first")
