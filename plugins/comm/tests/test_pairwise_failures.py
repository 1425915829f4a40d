"""Exchanges whose peers die, are late, or do not come: each rank ends with the error that says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from powertrain.testing.ports import free_port

HEAD = """
import os, signal, sys, time
import torch
from powertrain.environment import Rank
from powertrain.errors import CommunicationError
from powertrain.mesh import Mesh
from powertrain_comm.transport import TorchCommunicator
from powertrain_comm.watchdog.watched import WatchedCommunicator

rank = Rank.from_environment()
me, n = rank.index, rank.world_size
comm = TorchCommunicator("gloo", torch.device("cpu"), Mesh.build(n, me), rank, {torch_timeout})
if {watched}:
    comm = WatchedCommunicator(comm, {timeout})
comm.barrier().wait()
big = 6 * 2**20
"""


def run(tmp_path, body, *, n=2, watched=False, timeout=30.0, torch_timeout=30.0):
    """Run the script on ``n`` ranks; return the exit code and the two outputs of each."""
    script = tmp_path / "script.py"
    head = HEAD.format(watched=watched, timeout=timeout, torch_timeout=torch_timeout)
    script.write_text(head + textwrap.dedent(body))
    port = free_port()
    processes = []
    for rank in range(n):
        facts = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in facts.items()}, "MASTER_ADDR": "127.0.0.1"}
        files = [(tmp_path / f"{name}{rank}").open("w+") for name in ("out", "err")]
        process = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=files[0], stderr=files[1])
        processes.append((process, files))
    try:
        for process, _ in processes:
            process.wait(120)
    finally:
        for process, files in processes:
            process.kill()
            process.wait()
            for file in files:
                file.seek(0)
        texts = [[file.read() for file in files] for _, files in processes]
        for _, files in processes:
            for file in files:
                file.close()
    return [(process.returncode, out, err) for (process, _), (out, err) in zip(processes, texts, strict=True)]


DIES = """
start = {{
    "gather": lambda: comm.all_gather(torch.empty(n * big), torch.ones(big), label="w"),
    "scatter": lambda: comm.reduce_scatter(torch.empty(big), torch.ones(n * big), label="w"),
}}["{operation}"]
if me == n - 1:
    {before}
    os.kill(os.getpid(), signal.SIGKILL)
try:
    start().wait()
except CommunicationError as error:
    comm.report(error)
    print(error.code, error.message, flush=True)
comm.close()
"""


NAMES = {"gather": "all_gather", "scatter": "reduce_scatter"}


@pytest.mark.parametrize("operation", ["gather", "scatter"])
def test_a_peer_that_dies_before_an_exchange_is_told(tmp_path, operation):
    """A rank that is killed before it comes leaves the others with PeerFailed."""
    ends = run(tmp_path, DIES.format(operation=operation, before="time.sleep(0.5)"), n=3)
    assert ends[2][0] == -signal.SIGKILL
    for code, out, err in ends[:2]:
        assert (code, out.strip()) == (0, f"PT504 {NAMES[operation]} of 'w' lost the connection to another rank"), err


AMID = """
def state(pid):
    return open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[0]

peers = comm.gather_json(os.getpid(), label="processes")
if me < n - 1:
    handle = start()
    os.kill(os.getpid(), signal.SIGSTOP)
    start = lambda: handle
else:
    while any(state(pid) != "T" for pid in peers[:-1]):
        time.sleep(0.01)
    if not os.fork():
        os.closerange(3, 65536)
        while os.getppid() == peers[-1]:
            time.sleep(0.01)
        for pid in peers[:-1]:
            os.kill(pid, signal.SIGCONT)
        os._exit(0)
    handle = start()
    time.sleep(0.5)
"""


@pytest.mark.parametrize("operation", ["gather", "scatter"])
def test_a_peer_that_dies_amid_an_exchange_is_told(tmp_path, operation):
    """A rank that is killed amid an exchange leaves the others with an error, and with no result.

    The others do not read while it sends and dies, so that it cannot have sent more than sockets hold.
    """
    script = DIES.replace("if me == n - 1:\n", AMID + "if me == n - 1:\n", 1)
    ends = run(tmp_path, script.format(operation=operation, before="pass"), n=3, torch_timeout=10.0)
    assert ends[2][0] == -signal.SIGKILL
    lost, late = (f" {NAMES[operation]} of 'w' {what}" for what in ("lost the connection", "did not finish in time"))
    for code, out, err in ends[:2]:
        assert code == 0, err
        assert out.startswith(("PT504" + lost, "PT502" + late)), err


def test_a_connection_that_breaks_within_a_message_is_told(tmp_path):
    """A rank that dies between the two parts of a long message is found at once, not when time is up."""
    body = """
    from powertrain_comm.pairwise import TAGS, TAIL
    if me == 1:
        head = torch.ones(big)[: -TAIL // 4]
        comm._groups["data"].handle.send([head], 0, TAGS["all_gather"]).wait()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        comm.all_gather(torch.empty(n * big), torch.ones(big), label="w").wait()
    except CommunicationError as error:
        comm.report(error)
        print(error.code, time.monotonic() - start < 20, flush=True)
    comm.close()
    """
    assert run(tmp_path, body)[0][:2] == (0, "PT504 True\n")


def test_a_peer_that_never_comes_is_a_timeout(tmp_path):
    """Without a watchdog, torch's timeout of an exchange is a CollectiveStalled."""
    body = """
    if me == 0:
        try:
            comm.all_gather(torch.empty(2), torch.ones(1), label="w").wait()
        except CommunicationError as error:
            comm.report(error)
            print(error.code, error.message, flush=True)
    else:
        time.sleep(4)
        comm.report(RuntimeError())
    comm.close()
    """
    ends = run(tmp_path, body, torch_timeout=2.0)
    assert ends[0][:2] == (0, "PT502 all_gather of 'w' did not finish in time\n"), ends[0][2]


def test_a_prefetched_gather_is_never_a_stall(tmp_path):
    """An exchange that is waited for long after the watchdog's timeout, and was over long ago, ends no run."""
    body = """
    output = torch.empty(2 * n)
    handle = comm.all_gather(output, torch.full((2,), float(me)), label="prefetched")
    for _ in range(8):
        time.sleep(0.5)
        comm.all_reduce(torch.ones(1), label="meanwhile").wait()
    handle.wait()
    print(output.tolist())
    comm.close()
    """
    for code, out, err in run(tmp_path, body, watched=True, timeout=1.5):
        assert (code, out.strip()) == (0, "[0.0, 0.0, 1.0, 1.0]"), err


def test_an_exchange_that_stalls_is_reported(tmp_path):
    """A gather that a rank never issues is a stall that names rank and label, behind a prefetched one or not."""
    body = """
    early = comm.all_gather(torch.empty(2 * n), torch.ones(2), label="prefetched")
    if me == 0:
        comm.all_gather(torch.empty(4 * n), torch.ones(4), label="skipped").wait()
    time.sleep(60)
    """
    ends = run(tmp_path, body, watched=True, timeout=2.0)
    assert [end[0] for end in ends] == [1, 1]
    assert "PT502" in ends[0][2]
    assert "behind: rank 1 has not issued #2 along 'data'" in ends[0][2]
    assert "'skipped'" in ends[0][2]


def test_exchanges_that_differ_are_reported(tmp_path):
    """A rank that gathers where another one scatters: the watchdog names both."""
    body = """
    if me == 0:
        comm.all_gather(torch.empty(4 * n), torch.ones(4), label="gathered").wait()
    else:
        comm.reduce_scatter(torch.empty(4), torch.ones(4 * n), label="scattered").wait()
    """
    ends = run(tmp_path, body, watched=True, timeout=10.0)
    assert [end[0] for end in ends] == [1, 1]
    report = ends[0][2] + ends[1][2]
    assert "PT503" in report
    assert "all_gather of 'gathered'" in report
    assert "'scattered'" in report
