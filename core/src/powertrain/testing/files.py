"""What every file engine must do, as a class of tests.

::

    class TestMyEngine(FileEngineContract):
        def make(self):
            return MyEngine()
"""

from __future__ import annotations

import ctypes
import gc
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from powertrain.errors import StorageError, StorageUnwritable, TransferFailed
from powertrain.roles.files import FileEngine
from powertrain.testing.capability import needs

SIZE = 600_000
"""Bytes of the file that the property test works in."""

EXAMPLES = 25
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""What fails is shown as it was found: to shrink it, megabytes would be moved for minutes."""

PIECES = st.lists(
    st.tuples(
        st.booleans(),  # write?
        st.integers(0, SIZE // 2) | st.integers(0, SIZE // 8192).map(lambda block: block * 4096),
        st.integers(0, SIZE // 2) | st.integers(0, SIZE // 8192).map(lambda block: block * 4096),
        st.sampled_from([0, 0, 1, 64, 512, 4095]),  # how far the memory is from where the engine likes it
    ),
    min_size=1,
    max_size=8,
)


class FileEngineContract:
    """Tests of one engine, made anew for each."""

    def make(self) -> FileEngine:
        """Return a new engine."""
        raise NotImplementedError

    @contextmanager
    def opened(self) -> Iterator[FileEngine]:
        """Make an engine, and close it at the end."""
        engine = self.make()
        try:
            yield engine
        finally:
            engine.close()

    # --- the engine and its memory ---------------------------------------------------------

    def test_describes_itself(self) -> None:
        """It has a name, and an alignment that is a power of two."""
        with self.opened() as engine:
            assert engine.name
            assert engine.alignment > 0
            assert engine.alignment & (engine.alignment - 1) == 0

    @pytest.mark.parametrize("nbytes", [0, 1, 4096, (4 << 20) + 3])
    def test_its_memory_is_as_long_as_asked_and_aligned(self, nbytes: int) -> None:
        """A buffer is writable bytes, starts where the engine likes it, and outlives the engine; torch can share it."""
        with self.opened() as engine:
            memory, alignment = engine.buffer(nbytes), engine.alignment
        assert (len(memory), memory.readonly, memory.itemsize, memory.ndim) == (nbytes, False, 1, 1)
        if nbytes:
            assert ctypes.addressof(ctypes.c_char.from_buffer(memory)) % alignment == 0
            shared = torch.frombuffer(memory, dtype=torch.uint8)
            memory[-1] = 7
            assert shared[-1].item() == 7

    def test_closing_twice_is_harmless(self, tmp_path: Path) -> None:
        """A second ``close`` of a file and of an engine does nothing."""
        engine = self.make()
        with engine.open(tmp_path / "file", "create") as file:
            file.write(0, memoryview(b"content"))
            file.close()
            file.close()
        engine.close()
        engine.close()
        assert (tmp_path / "file").read_bytes() == b"content"

    # --- what is moved ---------------------------------------------------------------------

    @pytest.mark.parametrize("parts", [1, 3])
    def test_a_file_holds_what_a_bytearray_holds(self, tmp_path: Path, parts: int) -> None:
        """Any place, any length, any memory; one file, or several over which it is striped."""

        @settings(max_examples=EXAMPLES, deadline=None, phases=PHASES)
        @given(asked=PIECES, seed=st.integers(0, 2**32))
        def holds(asked: Sequence[tuple[bool, int, int, int]], seed: int) -> None:
            draw, right = random.Random(seed), bytearray(SIZE)
            with (
                TemporaryDirectory(dir=tmp_path) as place,
                self.opened() as engine,
                engine.open(names(Path(place), parts), "create") as file,
            ):
                file.resize(SIZE)
                file.write(0, memoryview(bytes(SIZE))).wait()
                memory = engine.buffer(SIZE)
                for writes, offset, length, off in asked:
                    piece = memory[off : off + length]
                    length = len(piece)
                    if writes:
                        piece[:] = data = draw.randbytes(length)
                        file.write(offset, piece).wait()
                        right[offset : offset + length] = data
                    else:
                        file.read(offset, piece).wait()
                        assert piece == right[offset : offset + length]
                whole = bytearray(SIZE)
                file.read(0, memoryview(whole)).wait()
                assert whole == right

        holds()

    @pytest.mark.parametrize("parts", [1, 3])
    def test_what_was_written_is_there_when_it_is_opened_again(self, tmp_path: Path, parts: int) -> None:
        """By another engine, in mode "read" and in mode "update", and of the same size."""
        data = random.Random(0).randbytes(300_000)
        with self.opened() as engine, engine.open(names(tmp_path, parts), "create") as file:
            file.resize(len(data))
            file.write(0, memoryview(data))
            file.sync()
        with self.opened() as engine:
            with engine.open(names(tmp_path, parts), "update") as file:
                assert file.size == len(data)
                file.write(1000, memoryview(b"other")).wait()
            with engine.open(names(tmp_path, parts), "read") as file:
                found = bytearray(len(data))
                file.read(0, memoryview(found)).wait()
        assert found == data[:1000] + b"other" + data[1005:]

    def test_neighbours_in_one_block_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        """Transfers under way at once may meet within a page that neither fills."""
        data = random.Random(2).randbytes(100_000)
        cuts = [0, 5000, 5001, 9000, 40_000, 40_960, 77_777, len(data)]
        with self.opened() as engine, engine.open(tmp_path / "file", "create") as file:
            file.resize(len(data))
            for _ in range(10):
                moves = [file.write(a, memoryview(data)[a:b]) for a, b in pairwise(cuts)]
                for move in moves:
                    move.wait()
            assert (tmp_path / "file").read_bytes() == data

    def test_many_are_under_way_and_awaited_in_any_order(self, tmp_path: Path) -> None:
        """Each transfer is one handle, which may be awaited more than once, and then is done."""
        block, count = 10_000, 200
        data = random.Random(3).randbytes(block * count)
        with self.opened() as engine, engine.open(tmp_path / "file", "create") as file:
            memory, found = engine.buffer(block * count), engine.buffer(block * count)
            memory[:] = data
            file.resize(block * count)
            for target, start in ((memory, file.write), (found, file.read)):
                moves = [start(n * block, target[n * block : (n + 1) * block]) for n in range(count)]
                for move in reversed(moves):
                    move.wait()
                    move.wait()
                    assert move.done()
            assert found == data

    def test_a_transfer_goes_on_although_nobody_waits(self, tmp_path: Path) -> None:
        """``done`` becomes true by itself."""
        with self.opened() as engine, engine.open(tmp_path / "file", "create") as file:
            move = file.write(0, memoryview(bytes(1 << 20)))
            pause = threading.Event()
            while not move.done():
                pause.wait(0.001)
            move.wait()

    def test_a_handle_may_be_dropped(self, tmp_path: Path) -> None:
        """Neither the handle nor the memory needs to be kept; ``sync`` waits for all."""
        with self.opened() as engine, engine.open(tmp_path / "file", "create") as file:
            for number in range(50):
                file.write(number * 10_000, memoryview(bytes([number]) * 10_000))
            gc.collect()
            file.sync()
            assert (tmp_path / "file").read_bytes() == b"".join(bytes([number]) * 10_000 for number in range(50))

    def test_nothing_is_moved_at_once(self, tmp_path: Path) -> None:
        """No bytes are no error, wherever."""
        with self.opened() as engine, engine.open(tmp_path / "file", "create") as file:
            for move in (file.write(0, memoryview(b"")), file.read(99, memoryview(bytearray()))):
                move.wait()
                assert move.done()

    def test_threads_share_it(self, tmp_path: Path) -> None:
        """Several threads write to one file, at places of their own."""
        part = 123_457
        data = random.Random(4).randbytes(part * 4)
        with self.opened() as engine, engine.open(tmp_path / "file", "create") as file:
            file.resize(len(data))

            def work(number: int) -> None:
                file.write(number * part, memoryview(data)[number * part : (number + 1) * part]).wait()

            threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            file.sync()
        assert (tmp_path / "file").read_bytes() == data

    @pytest.mark.parametrize("parts", [1, 3])
    def test_its_size_grows_and_shrinks(self, tmp_path: Path, parts: int) -> None:
        """``resize`` sets the size, over all parts, and keeps what lies before it."""
        data = random.Random(5).randbytes(SIZE)
        with self.opened() as engine, engine.open(names(tmp_path, parts), "create") as file:
            assert file.size == 0
            file.resize(SIZE)
            file.write(0, memoryview(data)).wait()
            for size in (SIZE // 2 + 17, SIZE, 3):
                file.resize(size)
                assert file.size == size == sum(path.stat().st_size for path in names(tmp_path, parts))
                found = bytearray(3)
                file.read(0, memoryview(found)).wait()
                assert found == data[:3]

    # --- what goes wrong -------------------------------------------------------------------

    def test_create_replaces_nothing(self, tmp_path: Path) -> None:
        """A file that is there is left as it is, and others that were made for the same call do not stay."""
        (tmp_path / "1").write_bytes(b"mine")
        with self.opened() as engine:
            for paths in ([tmp_path / "1"], [tmp_path / "0", tmp_path / "1"]):
                with pytest.raises(StorageUnwritable, match="1"):
                    engine.open(paths, "create")
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        assert (tmp_path / "1").read_bytes() == b"mine"

    @pytest.mark.parametrize("mode", ["read", "update"])
    def test_what_is_not_there_is_not_made(self, tmp_path: Path, mode: str) -> None:
        """Only "create" makes files."""
        with self.opened() as engine, pytest.raises(StorageUnwritable, match="missing"):
            engine.open(tmp_path / "missing", mode)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())

    def test_a_file_that_ends_too_early(self, tmp_path: Path) -> None:
        """A read that comes out short is an error with the file, and expected and actual bytes."""
        path = tmp_path / "short"
        path.write_bytes(bytes(5000))
        with self.opened() as engine, engine.open(path, "read") as file:
            move = file.read(0, engine.buffer(8192))
            with pytest.raises(TransferFailed) as caught:
                move.wait()
            told = str(caught.value)
            assert str(path) in told
            assert "8192" in told.replace(",", "")
            assert "5000" in told.replace(",", "")
            small = engine.buffer(100)
            file.read(0, small).wait()  # the file serves on

    def test_a_disk_that_is_full(self) -> None:
        """A write that fails raises when it is awaited; one that nobody awaits, when the file is synced."""
        needs(Path("/dev/full").exists(), "no device that is always full")
        with self.opened() as engine, engine.open("/dev/full", "update") as file:
            with pytest.raises(TransferFailed, match="/dev/full"):
                file.write(0, memoryview(bytes(100_000))).wait()
            file.write(0, memoryview(bytes(10)))
            with pytest.raises(TransferFailed, match="/dev/full"):
                file.sync()

    def test_more_than_the_disk_has(self, tmp_path: Path) -> None:
        """A size that no disk has is refused, and the file stays as it was."""
        with self.opened() as engine, engine.open(tmp_path / "file", "create") as file:
            file.resize(5000)
            with pytest.raises(StorageError):
                file.resize(1 << 58)
            assert file.size == 5000
        assert (tmp_path / "file").stat().st_size == 5000


def names(directory: Path, parts: int) -> list[Path]:
    """Return the paths of one logical file."""
    return [directory / str(number) for number in range(parts)]
