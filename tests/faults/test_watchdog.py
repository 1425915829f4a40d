"""Ranks that skip, raise, die or disagree: every process ends in time, and says why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import attrs
import pytest

from powertrain.testing.ports import free_port

TIMEOUT = 3.0
"""Seconds that the scripts give a collective."""

STALL = TIMEOUT + 5.0
"""Seconds in which a stalled run must be over, once it stalls."""

PROPAGATION = 10.0
"""Seconds in which the others must be over, once a rank failed."""

HEAD = """
import os, signal, sys, time
import torch
from powertrain.environment import Rank
from powertrain.mesh import Mesh
from powertrain.roles.accelerator import Accelerator
from powertrain_comm.config import CommConfig
from powertrain_comm.plugin import CommPlugin

class Host:
    def backends(self):
        return ("gloo",)
    def device(self, index):
        return torch.device("cpu")

rank = Rank.from_environment()
mesh = Mesh.build(rank.world_size, rank.index)
plugin = CommPlugin(CommConfig(cross_check="--cross-check" in sys.argv))
comm = plugin.make_communicator(None, Host(), mesh, rank, {timeout})
comm = plugin.wrap_communicator(comm, Host(), {timeout})
me = rank.index

def reduce(label, size=4):
    tensor = torch.ones(size)
    comm.all_reduce(tensor, label=label).wait()
    return tensor

reduce("warm-up")
print("connected", time.time(), flush=True)
"""


@attrs.frozen
class Ended:
    """How one rank ended.

    Attributes:
        code: its exit code.
        seconds: from the moment that the ranks were connected to its end.
        err: what it wrote to stderr.
        out: what it wrote to stdout.
    """

    code: int
    seconds: float
    err: str
    out: str


def environment(rank, n, port):
    variables = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    variables = {name: str(value) for name, value in variables.items()}
    return {**os.environ, **variables, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}


def write(tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(HEAD.format(timeout=TIMEOUT) + textwrap.dedent(body))
    return script


def line_of(script, text):
    """Return ``file:line`` of the line that holds ``text``."""
    lines = script.read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if text in line]
    return f"{script}:{number}"


def run(script, n=2, *arguments):
    """Run the script on ``n`` ranks; return how each ended."""
    port = free_port()
    files = [[(script.parent / f"{name}{rank}").open("w+") for name in ("out", "err")] for rank in range(n)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments], env=environment(rank, n, port), stdout=out, stderr=err
        )
        for rank, (out, err) in enumerate(files)
    ]
    ends = {}
    deadline = time.time() + 60
    try:
        while len(ends) < n and time.time() < deadline:
            for rank, process in enumerate(processes):
                if rank not in ends and process.poll() is not None:
                    ends[rank] = time.time()
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [[(file.seek(0), file.read(), file.close())[1] for file in pair] for pair in files]
    assert len(ends) == n, f"a rank hangs\n{texts}"
    starts = [float(found[1]) if (found := re.search(r"connected (\S+)", out)) else 0.0 for out, _ in texts]
    return [
        Ended(process.returncode, ends[rank] - max(starts), err, out)
        for rank, (process, (out, err)) in enumerate(zip(processes, texts, strict=True))
    ]


def test_a_skipped_collective_ends_both_ranks_with_a_report(tmp_path):
    """One rank skips a reduction and waits elsewhere: both end in time; the report names rank, label and both sites."""
    script = write(
        tmp_path,
        """
        reduce("first.weight")
        if me == 0:
            comm.all_reduce(torch.ones(4), label="second.weight").wait()  # the one that is skipped
        time.sleep(60)  # where the other is
        """,
    )
    ranks = run(script)
    assert [rank.code for rank in ranks] == [1, 1]
    assert max(rank.seconds for rank in ranks) <= STALL
    report = ranks[0].err
    assert "PT502" in report
    assert "behind: rank 1 has not issued #3 along 'data'" in report
    assert "second.weight" in report
    assert line_of(script, "# the one that is skipped") in report
    assert line_of(script, "# where the other is") in report
    assert "see rank 0" in ranks[1].err


def test_a_skipped_module_is_found_by_its_label(tmp_path):
    """Ranks that go on with equal shapes after one skipped: the first place where their labels differ is named."""
    script = write(
        tmp_path,
        """
        for layer in range(4):
            if (me, layer) == (1, 1):
                continue
            reduce(f"layers.{layer}.weight")
        if me == 1:
            reduce("metrics", size=4)  # elsewhere
            time.sleep(60)
        reduce("loss")
        reduce("metrics")
        """,
    )
    ranks = run(script)
    assert [rank.code for rank in ranks] == [1, 1]
    report = ranks[0].err + ranks[1].err
    assert "PT503" in report
    assert re.search(r"rank 0 issued all_reduce sum of 'layers\.1\.weight'", report)
    assert re.search(r"rank 1 issued all_reduce sum of 'layers\.2\.weight'", report)


def test_different_operations_are_found_before_the_timeout(tmp_path):
    """One rank reduces where the other gathers: both are named with their call sites, well before the timeout."""
    script = write(
        tmp_path,
        """
        if me == 0:
            comm.all_reduce(torch.ones(4), label="loss").wait()  # one way
        else:
            comm.all_gather(torch.empty(8), torch.ones(4), label="logits").wait()  # the other way
        time.sleep(60)
        """,
    )
    ranks = run(script)
    assert [rank.code for rank in ranks] == [1, 1]
    assert max(rank.seconds for rank in ranks) <= STALL
    report = ranks[0].err
    assert "PT503" in report
    assert "rank 0 issued" in report
    assert line_of(script, "# one way") in report
    assert "rank 1 issued all_gather of 'logits' float32[4]" in report
    assert line_of(script, "# the other way") in report


@pytest.mark.parametrize("late", [0, 1])
def test_different_shapes_are_a_divergence(tmp_path, late):
    """Different lengths at one reduction end both ranks and are reported as a divergence."""
    script = write(
        tmp_path,
        f"""
        if me == {late}:
            time.sleep(1)
        reduce("bucket", size=4 + 2 * me)
        """,
    )
    ranks = run(script)
    assert all(rank.code != 0 for rank in ranks)
    report = ranks[0].err + ranks[1].err
    assert "PT503" in report
    assert "float32[4]" in report
    assert "float32[6]" in report


def test_the_cross_check_finds_different_shapes_before_they_start(tmp_path):
    """With cross_check, different shapes raise on every rank before anything is sent."""
    script = write(
        tmp_path,
        """
        reduce("fine")
        reduce("bucket", size=4 + 2 * me)  # here
        """,
    )
    ranks = run(script, 2, "--cross-check")
    assert [rank.code for rank in ranks] == [1, 1]
    for rank in ranks:
        assert "PT503" in rank.err
        assert "rank 0: all_reduce sum 'bucket' float32[4]" in rank.err
        assert "rank 1: all_reduce sum 'bucket' float32[6]" in rank.err


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("where", ["collective", "compute"])
def test_an_exception_ends_the_others_with_its_traceback(tmp_path, failing, where):
    """A rank raises: the other ends within 10 s with that traceback, whether it waits in a collective or computes."""
    waiting = 'reduce("next")' if where == "collective" else "time.sleep(60)"
    script = write(
        tmp_path,
        f"""
        if me == {failing}:
            raise ValueError("the seventh sample is torn")  # the cause
        {waiting}
        """,
    )
    ranks = run(script)
    other = ranks[1 - failing]
    assert [rank.code for rank in ranks] == [1, 1]
    assert max(rank.seconds for rank in ranks) <= PROPAGATION
    assert f"rank {failing} raised:" in other.err
    assert "ValueError: the seventh sample is torn" in other.err
    assert line_of(script, "# the cause").replace(":", '", line ') in other.err
    assert other.err.count(f"rank {failing} raised:") == 1
    assert "ValueError: the seventh sample is torn" in ranks[failing].err


def test_a_reported_exception_ends_the_others(tmp_path):
    """What the engine reports reaches the others even though the rank catches the exception."""
    script = write(
        tmp_path,
        """
        if me == 1:
            try:
                raise RuntimeError("bad batch")
            except RuntimeError as error:
                comm.report(error)
            time.sleep(1)
            comm.close()
            sys.exit(3)
        reduce("next")
        """,
    )
    ranks = run(script)
    assert [rank.code for rank in ranks] == [1, 3]
    assert max(rank.seconds for rank in ranks) <= PROPAGATION
    assert "rank 1 raised:" in ranks[0].err
    assert "RuntimeError: bad batch" in ranks[0].err


def test_an_exception_on_every_rank_is_printed_by_each(tmp_path):
    """When all ranks raise the same, each prints its own traceback and none is called another's."""
    script = write(tmp_path, "raise ValueError(f'wrong on {me}')")
    ranks = run(script)
    assert [rank.code for rank in ranks] == [1, 1]
    for index, rank in enumerate(ranks):
        assert f"wrong on {index}" in rank.err
        assert "raised:" not in rank.err


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named(tmp_path, killed):
    """A rank is killed: the others end within 10 s and name it."""
    script = write(
        tmp_path,
        f"""
        if me == {killed}:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        reduce("next")
        """,
    )
    ranks = run(script, 3)
    assert ranks[killed].code == -signal.SIGKILL
    for index, rank in enumerate(ranks):
        if index != killed:
            assert rank.code == 1
            assert rank.seconds <= PROPAGATION
            assert f"rank {killed} died" in rank.err
            assert "PT504" in rank.err or "see rank" in rank.err


def test_nobody_waits_for_the_dead_when_it_closes(tmp_path):
    """The host of the board waits for those that still need it; one that was killed does not."""
    script = write(
        tmp_path,
        """
        if me == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            reduce("next")
        finally:
            started = time.monotonic()
            comm.close()
            print("closed in", time.monotonic() - started, flush=True)
        """,
    )
    host = run(script)[0]
    assert "rank 1 died" in host.err
    assert float(re.search(r"closed in (\S+)", host.out)[1]) < 3.0


def test_a_rank_that_leaves_early_is_named(tmp_path):
    """A rank closes and exits while the other still reduces: the other ends and says which collective it lacks."""
    script = write(
        tmp_path,
        """
        if me == 0:
            reduce("one more")
        comm.close()
        """,
    )
    ranks = run(script)
    assert [rank.code for rank in ranks] == [1, 0]
    assert ranks[0].seconds <= STALL
    assert "rank 1 has not issued #2 along 'data'" in ranks[0].err
    assert "one more" in ranks[0].err


@pytest.mark.parametrize("n", [2, 4])
def test_a_clean_run_is_silent(tmp_path, n):
    """A run without faults writes nothing of its own and exits with 0, even where ranks end at different times."""
    script = write(
        tmp_path,
        """
        for step in range(20):
            reduce(f"step {step}")
        time.sleep(0.7 * me)
        comm.close()
        """,
    )
    for rank in run(script, n):
        assert rank.code == 0
        assert rank.err == ""
        assert rank.out.count("\n") == 1


def test_a_run_that_forgets_to_close_is_silent(tmp_path):
    """A script that ends without close exits with 0 and in silence."""
    script = write(tmp_path, "reduce('last')")
    for rank in run(script):
        assert (rank.code, rank.err) == (0, "")


def test_a_slow_rank_within_the_timeout_is_left_alone(tmp_path):
    """A rank that comes late, but in time, disturbs nobody."""
    script = write(
        tmp_path,
        f"""
        if me == 1:
            time.sleep({TIMEOUT - 1})
        reduce("late")
        comm.close()
        """,
    )
    for rank in run(script):
        assert (rank.code, rank.err) == (0, "")


def test_under_torchrun_the_first_traceback_reaches_the_other_rank(tmp_path):
    """Under torchrun, too, the surviving rank prints the failing one's traceback, and torchrun blames the right one."""
    script = write(
        tmp_path,
        """
        if me == 1:
            raise ValueError("the seventh sample is torn")
        reduce("next")
        """,
    )
    logs = tmp_path / "logs"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--redirects", "3", "--log-dir", str(logs), str(script)]
    result = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1, result.stderr
    (other,) = logs.glob("**/0/stderr.log")
    assert "rank 1 raised:" in other.read_text()
    assert "ValueError: the seventh sample is torn" in other.read_text()
    root = result.stderr.partition("Root Cause")[2]
    assert re.search(r"rank\s*:\s*1 ", root), result.stderr
