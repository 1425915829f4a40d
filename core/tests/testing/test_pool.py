"""The pool of ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import attrs
import pytest
import torch

from powertrain.environment import Rank
from powertrain.testing.pool import RankPool, RanksFailed


@attrs.frozen
class Pair:
    left: int
    right: torch.Tensor


def place():
    return Rank.from_environment(), torch.get_num_threads(), os.getpid()


def double(pair, *, extra=0):
    return Pair(pair.left * 2 + extra, pair.right * 2)


def fail_on(rank, message):
    if int(os.environ["RANK"]) == rank:
        raise KeyError(message)


def hang_on(rank):
    print("about to wait")
    if int(os.environ["RANK"]) == rank:
        while True:
            time.sleep(0.05)


def die_on(rank):
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def leave_variable():
    seen = os.environ.get("LEFT_BEHIND"), os.environ.get("RANK"), str(Path.cwd())
    os.environ["LEFT_BEHIND"] = "yes"
    return seen


def leave_thread():
    threading.Thread(target=time.sleep, args=(30,), daemon=True, name="forgotten").start()


def leave_group():
    import torch.distributed as dist

    dist.init_process_group("gloo")


def all_reduce():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(value)
    dist.destroy_process_group()
    return value


def numbers():
    return torch.rand(3)


def test_each_rank_sees_its_place(ranks):
    """Ranks get the launcher's variables, one thread each, and a process each."""
    places, threads, processes = zip(*ranks(3, place), strict=True)
    assert [p.index for p in places] == [0, 1, 2]
    assert {(p.world_size, p.local_size, p.launcher) for p in places} == {(3, 3, "torchrun")}
    assert set(threads) == {1}
    assert len(set(processes)) == 3


def test_processes_are_kept(ranks):
    """A second call runs in the processes of the first."""
    first, second = ranks(2, place), ranks(2, place)
    assert [p[2] for p in first] == [p[2] for p in second]


def test_classes_and_tensors_travel(ranks):
    """Arguments and results may be tensors and classes of the test module itself."""
    for result in ranks(2, double, Pair(3, torch.arange(4)), extra=1):
        assert isinstance(result, Pair)
        assert result.left == 7
        assert torch.equal(result.right, torch.arange(4) * 2)


def test_a_process_group_forms(ranks):
    """Two ranks meet at the given address, call after call."""
    for _ in range(2):
        assert [v.item() for v in ranks(2, all_reduce)] == [3.0, 3.0]


def test_an_exception_is_shown_with_its_rank(ranks):
    """The error names the rank, carries its traceback and its exception."""
    with pytest.raises(RanksFailed, match="--- rank 1: raised") as caught:
        ranks(2, fail_on, 1, "the reason")
    assert list(caught.value.reports) == [1]
    assert "fail_on" in caught.value.reports[1]
    assert isinstance(caught.value.errors[1], KeyError)


def test_a_hang_is_ended_and_located():
    """A rank that hangs is killed; the report shows its stack and output; the pool works on."""
    with RankPool() as pool:
        pool(2, place)
        with pytest.raises(RanksFailed) as caught:
            pool.run(2, hang_on, (1,), timeout=1.0)
        assert caught.value.hung == {1}
        assert "in hang_on" in caught.value.reports[1]
        assert "about to wait" in caught.value.reports[1]
        assert len(pool(2, place)) == 2


def test_a_killed_rank_is_reported():
    """A process that dies is named with its signal, and replaced."""
    with RankPool() as pool:
        with pytest.raises(RanksFailed, match="rank 0: the process was killed by SIGKILL"):
            pool(2, die_on, 0)
        assert len(pool(2, place)) == 2


def test_surroundings_are_restored(ranks, tmp_path, monkeypatch):
    """A call's variables and directory end with it; the next starts in the caller's directory."""
    ranks(1, leave_variable)
    monkeypatch.chdir(tmp_path)
    assert ranks(1, leave_variable) == [(None, "0", str(tmp_path))]


def test_random_numbers_repeat(ranks):
    """Each call starts from the same random state."""
    assert torch.equal(ranks(1, numbers)[0], ranks(1, numbers)[0])


@pytest.mark.parametrize(("function", "what"), [(leave_thread, "'forgotten'"), (leave_group, "process group")])
def test_leaks_are_failures(function, what):
    """A function that leaves a thread or a process group behind fails, and does not disturb the next."""
    with RankPool() as pool:
        with pytest.raises(RanksFailed, match=f"returned, but .*{what}"):
            pool(1, function)
        assert len(pool(1, place)) == 1


def test_local_functions_are_refused(ranks):
    """A function that ranks could not find is refused before anything runs."""
    with pytest.raises(ValueError, match="top level"):
        ranks(1, lambda: 0)


def test_too_many_ranks_are_refused(ranks):
    """A call beyond the pool's limit is refused."""
    with pytest.raises(ValueError, match="at most 4"):
        ranks(5, place)
