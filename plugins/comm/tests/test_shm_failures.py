"""Ranks that share memory and die, leave or fork: the others are told soon, and nothing is left behind."""

from __future__ import annotations

import signal
import textwrap

import pytest
from processes import run_ranks

HEAD = """
import os, signal, sys, time
import torch
from powertrain.environment import Rank
from powertrain.errors import CommunicationError
from powertrain.mesh import Mesh
from powertrain_comm.shm.start import share
from powertrain_comm.transport import TorchCommunicator

rank = Rank.from_environment()
me, n = rank.index, rank.world_size
inner = TorchCommunicator("gloo", torch.device("cpu"), Mesh.build(n, me), rank, 60.0)
comm = share(inner, rank, {timeout}, asked=True)
comm.barrier().wait()
big = 6 * 2**20


def told(start):
    began = time.monotonic()
    try:
        start().wait()
    except CommunicationError as error:
        comm.report(error)
        print(error.code, error.message, "|", error.found, "|", time.monotonic() - began < 5.0, flush=True)
    else:
        print("no error", flush=True)
"""


def run(tmp_path, body, n=2, timeout=60.0):
    return run_ranks(tmp_path, HEAD.format(timeout=timeout) + textwrap.dedent(body), n)


@pytest.mark.parametrize("memory", ["comm.empty(big, torch.float32)", "torch.ones(big)"])
def test_a_rank_that_is_killed_before_it_comes(tmp_path, memory):
    """The others get PeerFailed within five seconds, whoever was killed, and it names the rank."""
    ends = run(
        tmp_path,
        f"""
        tensor = {memory}
        if me == n - 1:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        told(lambda: comm.all_reduce(tensor, label="w"))
        comm.close()
        """,
        n=3,
    )
    assert ends[2][0] == -signal.SIGKILL
    for code, out, err in ends[:2]:
        assert (code, out.strip()) == (0, "PT504 all_reduce of 'w' lost rank 2 | its process has ended | True"), err


def test_a_rank_that_is_killed_while_others_read_its_memory(tmp_path):
    """It dies amid a row of large collectives; what was mapped stays readable, and the error comes."""
    ends = run(
        tmp_path,
        """
        tensor = comm.empty(big, torch.float32).fill_(1.0)
        if me == 1:
            handles = [comm.all_reduce(tensor) for _ in range(8)]
            handles[2].wait()
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(8):
            told(lambda: comm.all_reduce(tensor))
        comm.close()
        """,
    )
    code, out, err = ends[0]
    lines = out.splitlines()
    assert code == 0, err
    assert lines[0] == "no error"
    assert lines[-1] == "PT504 all_reduce lost rank 1 | its process has ended | True"


def test_a_forked_child_does_not_hide_its_parents_death(tmp_path):
    """A child that outlives a killed rank holds its sockets and files: the rank's end is seen all the same."""
    ends = run(
        tmp_path,
        """
        if me == 1:
            if os.fork() == 0:
                for number in range(3):
                    os.close(number)
                time.sleep(20)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        told(lambda: comm.all_reduce(torch.ones(big)))
        comm.close()
        """,
    )
    assert ends[0][1].strip() == "PT504 all_reduce lost rank 1 | its process has ended | True", ends[0][2]


def test_a_forked_child_changes_nothing(tmp_path):
    """A child that ends drops its copies of shared tensors; the parent's stay as they are."""
    ends = run(
        tmp_path,
        """
        tensor = comm.empty(big, torch.float32).fill_(2.0)
        child = os.fork()
        if child == 0:
            del tensor
            comm._host.engine.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert (tensor == 2.0).all()
        comm.all_reduce(tensor).wait()
        print("sum", tensor.unique().item())
        comm.close()
        """,
    )
    assert [(code, out.strip()) for code, out, _ in ends] == [(0, "sum 4.0")] * 2, ends


def test_a_rank_that_left_is_not_waited_for(tmp_path):
    """A rank that closed in order while others still wait for it: they are told that it has left."""
    ends = run(
        tmp_path,
        """
        if me == 1:
            comm._host.engine.close()
            time.sleep(8)
            os._exit(0)
        told(lambda: comm.all_reduce(torch.ones(3)))
        os._exit(0)
        """,
    )
    assert ends[0][1].strip() == "PT504 all_reduce lost rank 1 | it has left | True", ends[0][2]


def test_a_rank_that_does_not_come_is_a_stall(tmp_path):
    """Without a death, the timeout ends it."""
    ends = run(
        tmp_path,
        """
        if me == 1:
            time.sleep(4)
            os._exit(0)
        told(lambda: comm.all_reduce(torch.ones(3), label="w"))
        os._exit(0)
        """,
        timeout=1.5,
    )
    assert ends[0][1].startswith("PT502 all_reduce of 'w' did not finish in time"), ends[0]


def test_all_ranks_killed_leave_nothing(tmp_path):
    """After kill -9 of every rank, the memory that they shared is the system's again."""
    ends = run(
        tmp_path,
        """
        tensor = comm.empty(40_000_000, torch.float32).fill_(1.0)
        comm.all_reduce(tensor).wait()
        print(sorted(name for name in os.listdir("/dev/shm") if "powertrain" in name), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    for code, out, err in ends:
        assert (code, out.strip()) == (-signal.SIGKILL, "[]"), err


def test_a_dropped_handle_keeps_its_tensors(tmp_path):
    """Nobody waits and the tensor's name is gone: peers read it until they are through."""
    ends = run(
        tmp_path,
        """
        for _ in range(20):
            comm.broadcast(comm.empty(1_000_000, torch.float32).fill_(3.0) if me == 0 else torch.empty(1_000_000), 0)
        total = torch.ones(1)
        comm.all_reduce(total).wait()
        print(total.item())
        comm.close()
        """,
    )
    assert [(code, out.strip()) for code, out, _ in ends] == [(0, "2.0")] * 2, ends


def test_closing_ends_what_is_under_way(tmp_path):
    """Who waits when the memory is closed, and who asks afterwards, gets an error and no wait without end."""
    ends = run(
        tmp_path,
        """
        import threading
        if me == 1:
            time.sleep(6)
            os._exit(0)
        handle = comm.all_reduce(torch.ones(3))
        waiter = threading.Thread(target=told, args=(lambda: handle,))
        waiter.start()
        time.sleep(0.5)
        comm._host.engine.close()
        waiter.join(5)
        told(lambda: comm.all_reduce(torch.ones(3)))
        comm._host.engine.close()
        os._exit(int(waiter.is_alive()))
        """,
    )
    assert ends[0][0] == 0, ends[0][2]
    assert ends[0][1].splitlines() == ["PT500 all_reduce failed | rank 0: it has left the run | True"] * 2, ends[0][2]


def test_a_forked_child_may_drop_everything(tmp_path):
    """A child that destroys its copy of the engine does not wait for the thread that only its parent has."""
    ends = run(
        tmp_path,
        """
        import gc
        comm.all_reduce(torch.ones(big)).wait()
        child = os.fork()
        if child == 0:
            comm._under_way.clear()
            comm._host = None
            gc.collect()
            os._exit(0)
        began = time.monotonic()
        while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() - began < 20:
            time.sleep(0.05)
        print("ended", time.monotonic() - began < 20)
        comm.close()
        """,
    )
    assert [(code, out.strip()) for code, out, _ in ends] == [(0, "ended True")] * 2, ends
