"""What every engine moves is what was asked for: any place, any length, any memory, any number at once."""

from __future__ import annotations

import gc
import random
import tempfile
import threading
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain_offload import io

STRIPE = 1 << 16
PLACES = [place for place in (tempfile.gettempdir(), "/dev/shm") if Path(place).is_dir()]
"""A file system that mostly has direct transfers, and one that has none."""

pieces = st.lists(
    st.tuples(
        st.booleans(),  # write?
        st.integers(0, 5 * STRIPE) | st.integers(0, 40).map(lambda block: block * 4096),
        st.integers(0, 3 * STRIPE) | st.integers(0, 24).map(lambda block: block * 4096),
        st.sampled_from([0, 0, 1, 4, 64, 512, 4095]),  # how far the memory is from a page
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture(params=io.KINDS)
def kind(request):
    if reason := io.available()[request.param]:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def engine(kind):
    with io.open_engine(kind, block=1 << 14, depth=4, threads=3) as engine:
        yield engine


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", io.KINDS)
def test_a_file_holds_what_a_bytearray_holds(kind, parts, place):
    if reason := io.available()[kind]:
        pytest.skip(reason)

    @settings(max_examples=25, deadline=None)
    @given(asked=pieces, block=st.sampled_from([4096, 3 * 4096, 1 << 16]), seed=st.integers(0, 2**32))
    def holds(asked, block, seed):
        draw = random.Random(seed)
        with (
            tempfile.TemporaryDirectory(dir=place) as directory,
            io.open_engine(kind, block=block, depth=3, threads=2) as engine,
            engine.open([Path(directory, str(n)) for n in range(parts)], "create", stripe=STRIPE) as file,
        ):
            right = bytearray(9 * STRIPE)
            file.resize(len(right))
            memory = engine.buffer(4 * STRIPE)
            for writes, offset, length, off in asked:
                piece = memory[off : off + length]
                if writes:
                    piece[:] = data = draw.randbytes(length)
                    file.write(offset, piece).wait()
                    right[offset : offset + length] = data
                else:
                    file.read(offset, piece).wait()
                    assert piece == right[offset : offset + length]
            whole = bytearray(len(right))
            file.read(0, memoryview(whole)).wait()
            assert whole == right
            file.sync()

    holds()


def test_stripes_lie_where_the_format_says(engine, tmp_path):
    data = random.Random(0).randbytes(5 * STRIPE + 100)
    paths = [tmp_path / "a", tmp_path / "b"]
    with engine.open(paths, "create", stripe=STRIPE) as file:
        file.resize(len(data))
        file.write(0, memoryview(data)).wait()
    stripes = [data[at : at + STRIPE] for at in range(0, len(data), STRIPE)]
    assert paths[0].read_bytes() == stripes[0] + stripes[2] + stripes[4]
    assert paths[1].read_bytes() == stripes[1] + stripes[3] + stripes[5]
    with engine.open(paths, "read", stripe=STRIPE) as file:
        assert file.size == len(data)


def test_what_one_engine_wrote_the_others_read(tmp_path):
    working = [kind for kind, reason in io.available().items() if reason is None]
    data = random.Random(1).randbytes(3 * STRIPE + 77)
    for writer in working:
        paths = [tmp_path / f"{writer}-{number}" for number in range(2)]
        with io.open_engine(writer) as engine, engine.open(paths, "create", stripe=STRIPE) as file:
            file.write(0, memoryview(data)).wait()
            for reader in working:
                found = bytearray(len(data))
                with io.open_engine(reader) as other, other.open(paths, "read", stripe=STRIPE) as same:
                    same.read(0, memoryview(found)).wait()
                assert found == data, (writer, reader)


def test_neighbours_in_one_block_do_not_disturb_each_other(engine, tmp_path):
    """Both write to the same page at the same time, at an edge that neither owns."""
    data = random.Random(2).randbytes(100_000)
    with engine.open(tmp_path / "file", "create") as file:
        file.resize(len(data))
        cuts = [0, 5000, 5001, 9000, 40_000, 40_960, 77_777, len(data)]
        for _ in range(10):
            moves = [file.write(a, memoryview(data)[a:b]) for a, b in pairwise(cuts)]
            for move in moves:
                move.wait()
        assert (tmp_path / "file").read_bytes() == data


def test_many_transfers_are_under_way_at_once_and_each_is_one_handle(engine, tmp_path):
    block, count = 10_000, 300
    memory = engine.buffer(block * count)
    memory[:] = data = random.Random(3).randbytes(block * count)
    with engine.open(tmp_path / "file", "create") as file:
        file.resize(block * count)
        moves = [file.write(n * block, memory[n * block : (n + 1) * block]) for n in range(count)]
        for move in reversed(moves):
            move.wait()
            assert move.done()
        found = engine.buffer(block * count)
        moves = [file.read(n * block, found[n * block : (n + 1) * block]) for n in range(count)]
        file.sync()  # waits for all
        assert all(move.done() for move in moves)
        assert found == data


def test_a_transfer_goes_on_although_nobody_waits(engine, tmp_path):
    with engine.open(tmp_path / "file", "create") as file:
        move = file.write(0, memoryview(bytes(1 << 20)))
        pause = threading.Event()
        while not move.done():
            pause.wait(0.001)
        move.wait()
        move.wait()  # again does nothing


def test_threads_share_an_engine(engine, tmp_path):
    data = [random.Random(n).randbytes(70_001) for n in range(4)]
    errors = []

    def work(number):
        try:
            with engine.open(tmp_path / str(number), "create") as file:
                for _ in range(10):
                    file.write(5, memoryview(data[number])).wait()
                    found = bytearray(len(data[number]))
                    file.read(5, memoryview(found)).wait()
                    assert found == data[number]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_threads_share_a_file(engine, tmp_path):
    part = 123_457
    data = random.Random(4).randbytes(part * 4)
    with engine.open(tmp_path / "file", "create") as file:
        file.resize(len(data))
        threads = [
            threading.Thread(
                target=lambda n=n: file.write(n * part, memoryview(data)[n * part : (n + 1) * part]).wait()
            )
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        file.sync()
    assert (tmp_path / "file").read_bytes() == data


class Memory(bytearray):
    """Memory that tells when it goes."""

    __slots__ = ("__weakref__",)


def test_memory_lives_as_long_as_the_transfer_and_no_longer(engine, tmp_path):
    data = Memory(random.Random(5).randbytes(3_000_001))
    right, gone = bytes(data), weakref.ref(data)
    with engine.open(tmp_path / "file", "create") as file:
        move = file.write(0, memoryview(data))
        del data
        gc.collect()
        move.wait()
        gc.collect()
        assert gone() is None
        assert (tmp_path / "file").read_bytes() == right


def test_a_handle_may_be_dropped(engine, tmp_path):
    with engine.open(tmp_path / "file", "create") as file:
        for number in range(50):
            file.write(number * 10_000, memoryview(bytes([number]) * 10_000))
        file.sync()
        assert (tmp_path / "file").read_bytes() == b"".join(bytes([number]) * 10_000 for number in range(50))


def test_nothing_is_moved_at_once(engine, tmp_path):
    with engine.open(tmp_path / "file", "create") as file:
        for move in (file.write(0, memoryview(b"")), file.read(99, memoryview(bytearray()))):
            assert move.done()
            move.wait()


def test_items_of_any_size_and_shape_travel_as_bytes(engine, tmp_path):
    import array

    numbers = array.array("d", range(100))
    with engine.open(tmp_path / "file", "create") as file:
        file.write(0, memoryview(numbers)).wait()
        found = array.array("d", bytes(800))
        file.read(0, memoryview(found)).wait()
        assert found == numbers
        shaped = memoryview(bytearray(24)).cast("B", (4, 6))
        file.read(0, shaped).wait()


def test_memory_of_the_engine_serves_torch(engine, tmp_path):
    torch = pytest.importorskip("torch")
    memory = engine.buffer(5 << 20)
    tensor = torch.frombuffer(memory, dtype=torch.float32)
    tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float32))
    assert tensor.data_ptr() % engine.alignment == 0
    with engine.open(tmp_path / "file", "create") as file:
        file.write(0, memory).wait()
        del memory
        tensor.zero_()
        file.read(0, memoryview(tensor.numpy())).wait()
    assert torch.equal(tensor, torch.arange(tensor.numel(), dtype=torch.float32))


@pytest.mark.parametrize("nbytes", [0, 1, 4096, (4 << 20) + 3])
def test_a_buffer_is_as_long_as_asked(nbytes):
    with io.open_engine("threads") as engine:
        memory = engine.buffer(nbytes)
        assert (len(memory), memory.readonly, memory.itemsize) == (nbytes, False, 1)
        with pytest.raises(ValueError, match="nbytes"):
            engine.buffer(-1)


@pytest.mark.parametrize("parts", [1, 3])
def test_resize_grows_and_shrinks(engine, tmp_path, parts):
    paths = [tmp_path / str(number) for number in range(parts)]
    with engine.open(paths, "create", stripe=STRIPE) as file:
        assert file.size == 0
        for size in (5 * STRIPE + 17, 2 * STRIPE, 7 * STRIPE, 3, 0):
            file.resize(size)
            assert file.size == size == sum(path.stat().st_size for path in paths)
            with engine.open(paths, "read", stripe=STRIPE) as again:
                assert again.size == size
