"""A rank's file of state: space that is set aside and given back, and a file that nobody sees and nobody leaves."""

from __future__ import annotations

import errno
import itertools
import os
import random
import subprocess
import sys
import threading
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.errors import StorageFull, StorageUnwritable
from powertrain_offload import io, swap
from powertrain_offload.swap import PAGE, SwapFile, sweep


@pytest.fixture
def engine():
    with io.open_engine("threads", threads=2) as engine:
        yield engine


@pytest.fixture
def file(engine, tmp_path):
    made = SwapFile(engine, [tmp_path])
    yield made
    made.close()


SIZES = st.one_of(st.integers(0, 3 * PAGE), st.integers(0, 40).map(lambda pages: pages * PAGE))


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), SIZES, st.integers(0, 2**16)), max_size=60))
def test_what_is_set_aside_never_overlaps(tmp_path_factory, steps):
    """Pieces are whole pages apart from one another, however they come and go; all given back, nothing is used."""
    with io.open_engine("threads", threads=1) as engine:
        file = SwapFile(engine, [tmp_path_factory.mktemp("swap")])
        held: list[tuple[int, int]] = []
        for takes, nbytes, chance in steps:
            if takes or not held:
                start = file.allocate(nbytes, "piece")
                assert start % PAGE == 0
                assert start + nbytes <= file.file.size or not nbytes
                held.append((start, nbytes))
            else:
                file.free(*held.pop(chance % len(held)))
            pages = sorted((start, start + -(-nbytes // PAGE) * PAGE) for start, nbytes in held if nbytes)
            assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(pages))
            assert file.used == sum(stop - start for start, stop in pages)
        for start, nbytes in held:
            file.free(start, nbytes)
        assert file.used == 0
        assert file.allocate(PAGE, "first again") == 0
        file.close()


def test_neighbouring_gaps_become_one(file):
    """Three pieces given back, in any order, are room for one of their size together."""
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        starts = [file.allocate(10 * PAGE, "piece") for _ in range(3)]
        guard = file.allocate(PAGE, "guard")
        for index in order:
            file.free(starts[index], 10 * PAGE)
        assert file.allocate(30 * PAGE, "together") == min(starts)
        file.free(min(starts), 30 * PAGE)
        file.free(guard, PAGE)
        assert file.used == 0


def test_the_smallest_gap_that_fits_is_taken(file):
    starts = [file.allocate(size * PAGE, "piece") for size in (8, 1, 3, 1, 5, 1)]
    for index, size in ((0, 8), (2, 3), (4, 5)):
        file.free(starts[index], size * PAGE)
    assert file.allocate(3 * PAGE, "three") == starts[2]
    assert file.allocate(4 * PAGE, "four") == starts[4]
    assert file.allocate(1, "one byte") == starts[4] + 4 * PAGE


def test_it_grows_by_steps_and_never_for_what_was_given_back(file):
    start = file.allocate(100, "small")
    first = file.file.size
    assert first == 64 * 2**20
    for _ in range(100):
        piece = file.allocate(30 * 2**20, "large")
        file.free(piece, 30 * 2**20)
    assert file.file.size == first
    file.allocate(200 * 2**20, "larger")
    assert file.file.size >= 200 * 2**20
    file.free(start, 100)


def test_threads_share_it(file):
    """Pieces that several threads hold at once are not the same."""
    taken, errors = [], []

    def work(number):
        draw = random.Random(number)
        try:
            for _ in range(100):
                size = draw.randrange(1, 20) * PAGE
                start = file.allocate(size, "piece")
                taken.append((start, size))
                assert all(a + n <= start or start + size <= a for a, n in list(taken) if (a, n) != (start, size))
                taken.remove((start, size))
                file.free(start, size)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert file.used == 0


def test_nothing_is_to_be_seen(engine, tmp_path):
    """The directories are empty while the file is open, and their space is in use."""
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    file = SwapFile(engine, places)
    file.allocate(1000, "piece")
    assert [list(place.iterdir()) for place in places] == [[], []]
    assert file.file.size == 64 * 2**20
    file.close()
    file.close()


def test_no_room_is_told_with_numbers(file, tmp_path, monkeypatch):
    """A smaller step is tried first; then the error says for what, how much is missing and how much is free."""
    file.allocate(1000, "piece")
    asked = []

    def resize(size):
        asked.append(size)
        raise StorageFull("there is no room")

    monkeypatch.setattr(file.file, "resize", resize)
    with pytest.raises(StorageFull, match="no room for the masters of unit 3") as caught:
        file.allocate(65 * 2**20, "the masters of unit 3")
    assert asked == [64 * 2**20 + 64 * 2**20, PAGE + 65 * 2**20]
    assert str(tmp_path) in caught.value.where
    assert f"{65 * 2**20 + PAGE - 64 * 2**20:,} bytes more, beside {64 * 2**20:,}" in caught.value.expected
    assert "bytes free" in caught.value.found
    monkeypatch.undo()
    assert file.allocate(1000, "goes on") == PAGE


def test_a_directory_without_room_for_a_name(engine, tmp_path, monkeypatch):
    """Where the file cannot be made, nothing is left."""
    monkeypatch.setattr(os, "open", opens_no_new_files(os.open))
    with pytest.raises(StorageUnwritable):
        SwapFile(engine, [tmp_path])
    assert not list(tmp_path.iterdir())


def opens_no_new_files(real):
    def opening(path, flags, *rest):
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return real(path, flags, *rest)

    return opening


# --- what killed runs leave -------------------------------------------------------------------------


def name(host):
    return f"powertrain-swap-{host}-{uuid.uuid4().hex}"


def test_only_leftovers_of_this_host_are_removed(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(swap, "_host", lambda: "this-host")
    mine = [name("this-host"), name("this-host")]
    others = [
        name("other-host"),
        name("this-host-2"),
        "powertrain-swap-this-host-short",
        f"{name('this-host')}.txt",
        f"my-{name('this-host')}",
        "train.toml",
    ]
    for each in (*mine, *others):
        (tmp_path / each).touch()
    (tmp_path / name("this-host")).mkdir()  # no file of ours
    SwapFile(engine, [tmp_path]).close()
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert left == set(others)


def test_a_directory_that_cannot_be_locked_is_not_swept(engine, tmp_path, monkeypatch):
    """Where nobody can tell whether its owner lives, a file stays; the run goes on."""

    def refuses(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(swap.fcntl, "flock", refuses)
    (tmp_path / name(swap._host())).touch()
    SwapFile(engine, [tmp_path]).close()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_living_file_is_not_swept(engine, tmp_path):
    """One that is open has no name any more; sweeping beside it takes nothing away."""
    file = SwapFile(engine, [tmp_path])
    start = file.allocate(PAGE, "piece")
    file.file.write(start, memoryview(b"x" * PAGE)).wait()
    sweep(tmp_path)
    SwapFile(engine, [tmp_path]).close()
    found = bytearray(PAGE)
    file.file.read(start, memoryview(found)).wait()
    assert found == b"x" * PAGE
    file.close()


TOGETHER = """
import sys
from pathlib import Path
from powertrain_offload import io
from powertrain_offload.swap import SwapFile

mine, places = int(sys.argv[1]), [Path(place) for place in sys.argv[2:]]
with io.open_engine("threads", threads=1) as engine:
    for turn in range(60):
        file = SwapFile(engine, places)
        data = bytes([mine]) * 8192
        start = file.allocate(8192, "piece")
        file.file.write(start, memoryview(data)).wait()
        found = bytearray(8192)
        file.file.read(start, memoryview(found)).wait()
        assert found == data
        file.close()
"""


def test_processes_that_start_at_once_take_turns(tmp_path):
    """They make, sweep and unname in two directories, listed in another order, and never take each other's file."""
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    orders = [places, places[::-1], places]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(number), *map(str, order)], stderr=subprocess.PIPE, text=True
        )
        for number, order in enumerate(orders)
    ]
    try:
        told = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], told
    assert [list(place.iterdir()) for place in places] == [[], []]
