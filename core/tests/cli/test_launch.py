"""`powertrain launch`: what the ranks are given, how they fail, how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from powertrain.cli.launch_plan import LaunchPlan, check_endpoint, parse_nodes, rank_variables
from powertrain.errors import LaunchError
from powertrain.testing import ports


@pytest.fixture
def script(tmp_path):
    """Write a script in a directory whose name has a space, and return its path."""
    directory = tmp_path / "a directory"
    directory.mkdir()

    def write(source: str, name: str = "train it.py") -> str:
        path = directory / name
        path.write_text(source)
        return str(path)

    return write


def test_ranks_get_their_arguments_and_place(powertrain, script):
    """Each rank runs the script as __main__, with its arguments, its rank and its directory importable."""
    Path(script("value = 7\n", "beside.py"))
    path = script(
        "import os, sys, beside\n"
        "line = [os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')] + sys.argv[1:] + [__name__]\n"
        "os.write(1, (' '.join(line) + '\\n').encode())\n"
    )
    done = powertrain("launch", "--nproc", "2", path, "--lr", "3", "--", "-x", "two words")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} 2 {rank} --lr 3 -- -x two words __main__" for rank in (0, 1)]
    assert not done.stderr


def test_script_sees_what_python_would_give_it(powertrain, script, environ):
    """argv, __file__, sys.path and __name__ are those of `python script.py`."""
    path = script("import sys; print(sys.argv, __file__, sys.path[0], __name__, __doc__)")
    launched = powertrain("launch", path, "x")
    plain = subprocess.run([sys.executable, path, "x"], capture_output=True, text=True, env=environ, check=True)
    assert launched.stdout == plain.stdout


def test_shared_cores_are_told_unless_silence_is_wanted(powertrain, script, environ):
    """Setting OMP_NUM_THREADS costs one line, and none with POWERTRAIN_LOG=error."""
    environ.pop("OMP_NUM_THREADS")
    path = script("pass")
    told = powertrain("launch", "--nproc", "2", path).stderr.splitlines()
    assert len(told) == 1 and "OMP_NUM_THREADS=" in told[0]
    assert powertrain("launch", "--nproc", "2", path, POWERTRAIN_LOG="error").stderr == ""


def test_module(powertrain, script):
    """--module runs a module of the working directory as `python -m` does."""
    path = Path(script("import sys; print(__name__, sys.argv[1:])", "trainer.py"))
    done = powertrain("launch", "--module", "trainer", "-v", cwd=path.parent)
    assert (done.returncode, done.stdout) == (0, "__main__ ['-v']\n"), done.stderr


def test_config_error_is_told_once_with_code_two(powertrain, script):
    """An error that every rank raises is told in words by one of them, and its exit code is kept."""
    path = script(
        "from powertrain.errors import ConfigError\n"
        "def build():\n    raise ConfigError('the batch is odd', problems=('a.toml:3:1 batch.micro',))\n"
        "build()\n"
    )
    done = powertrain("launch", "--nproc", "2", path)
    assert done.returncode == 2
    assert done.stderr.count("the batch is odd") == 1
    assert "a.toml:3:1 batch.micro" in done.stderr
    assert "exited with code 2" in done.stderr and "its message is above" in done.stderr
    assert "Traceback" not in done.stderr and "elastic" not in done.stderr


def test_error_of_one_rank_shows_the_script_only(powertrain, script):
    """An exception on one rank ends the others; its traceback starts in the script, and the last line names it."""
    path = script(
        "import os, time\n"
        "def train():\n    raise ValueError('odd rank')\n"
        "if os.environ['RANK'] == '1':\n    train()\n"
        "time.sleep(60)\n"
    )
    done = powertrain("launch", "--nproc", "2", path)
    assert done.returncode == 1
    assert "[rank 1] Traceback" in done.stderr and "ValueError: odd rank" in done.stderr
    assert "worker.py" not in done.stderr and "runpy" not in done.stderr and "torch" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rank 1 (pid ") and last.endswith("exited with code 1; its message is above")


def test_different_errors_are_all_told(powertrain, script):
    """Ranks that fail differently each tell their own error."""
    path = script(
        "import os, pathlib, time\n"
        "rank = os.environ['RANK']\n"
        "mine = pathlib.Path(__file__).with_name('ready' + rank)\n"
        "other = pathlib.Path(__file__).with_name('ready' + str(1 - int(rank)))\n"
        "mine.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "raise RuntimeError('from ' + rank)\n"
    )
    done = powertrain("launch", "--nproc", "2", path)
    assert done.returncode == 1
    assert "RuntimeError: from 0" in done.stderr and "RuntimeError: from 1" in done.stderr


def test_exit_codes_of_the_script_are_kept(powertrain, script):
    """sys.exit(n) of a rank is the launch's exit code."""
    assert powertrain("launch", script("import sys; sys.exit(5)")).returncode == 5


def test_killed_rank_is_named_with_its_signal(powertrain, script):
    """A rank that is killed is reported with the signal's name, and the exit code is 1."""
    path = script("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = powertrain("launch", path)
    assert done.returncode == 1
    assert "rank 0" in done.stderr and "SIGKILL" in done.stderr


def test_rank_that_cannot_end_is_still_the_one_that_failed(powertrain, script):
    """The rank that told its error first is named with its own code, even if the agent had to end it."""
    path = script(
        "import atexit, os, pathlib, time\n"
        "told = pathlib.Path(__file__).with_name('told')\n"
        "if os.environ['RANK'] == '1':\n"
        "    atexit.register(time.sleep, 60)\n"
        "    atexit.register(told.touch)\n"
        "    raise ValueError('the first')\n"
        "while not told.exists(): time.sleep(0.01)\n"
        "os._exit(9)\n"
    )
    done = powertrain("launch", "--nproc", "2", path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rank 1 (pid ") and last.endswith("exited with code 1; its message is above")
    assert done.returncode == 1


def test_killed_rank_is_named_before_those_that_missed_it(powertrain, script):
    """A rank that was killed is the cause, whatever the others said when they lost it."""
    path = script(
        "import os, signal, time\n"
        "from powertrain.errors import PeerFailed\n"
        "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(0.5)\nraise PeerFailed('rank 1 is gone')\n"
    )
    done = powertrain("launch", "--nproc", "2", path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("rank 1 (pid ")
    assert "SIGKILL" in done.stderr.splitlines()[-1]


def test_syntax_error_is_shown_like_python_does(powertrain, script):
    """A script that does not parse shows the line, without any of our frames."""
    done = powertrain("launch", script("def f(:\n"))
    assert done.returncode == 1
    assert "SyntaxError" in done.stderr and "worker.py" not in done.stderr


def test_restart_runs_the_ranks_again(powertrain, script):
    """--max-restarts starts the ranks again after a failure."""
    path = script(
        "import os, sys\nprint(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "sys.exit(3 if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' else 0)\n"
    )
    done = powertrain("launch", "--max-restarts", "1", path)
    assert (done.returncode, done.stdout) == (0, "0\n1\n"), done.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_end_every_rank(environ, script, name, code):
    """Ctrl-C and SIGTERM end all ranks, cost one line and have their usual exit codes."""
    process, ranks = _start_sleepers(environ, script)
    os.killpg(process.pid, getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not any(_runs(pid) for pid in ranks)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_ranks_do_not_outlive_a_killed_launcher(environ, script):
    """kill -9 of the launcher leaves no rank behind."""
    process, ranks = _start_sleepers(environ, script)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _start_sleepers(environ, script):
    path = script("import os, time\nos.write(1, b'%d\\n' % os.getpid())\ntime.sleep(100)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "powertrain.cli", "launch", "--nproc", "2", path],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, [int(process.stdout.readline()) for _ in range(2)]


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("extra", [[], ["--node-rank"]])
def test_two_nodes_meet(environ, script, extra, free_port):
    """Two launchers that are given one endpoint become one world, with or without fixed node ranks."""
    path = script("import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'])")
    processes = []
    for node in range(2):
        fixed = [*extra, str(node)] if extra else []
        endpoint = f"127.0.0.1:{free_port}"
        command = ["launch", "--nproc", "1", "--nnodes", "2", "--rdzv-endpoint", endpoint, *fixed, path]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "powertrain.cli", *command], env=environ, stdout=subprocess.PIPE, text=True
            )
        )
    outputs = sorted(process.communicate(timeout=90)[0] for process in processes)
    assert outputs == ["0 2\n", "1 2\n"]


@pytest.fixture
def free_port():
    """A port that nobody listens on."""
    return ports.free_port()


def test_dry_run_prints_a_command_that_works(powertrain, script, environ, tmp_path):
    """--dry-run starts nothing and prints variables and a torchrun command that a shell can run."""
    path = script("import os; os.write(1, b'%s\\n' % os.environ['OMP_NUM_THREADS'].encode())")
    environ.pop("OMP_NUM_THREADS")
    done = powertrain("launch", "--dry-run", "--nproc", "2", path, "a b")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("OMP_NUM_THREADS=") and done.stdout.endswith("'a b'\n")
    assert " torchrun --nproc-per-node=2 --standalone " in done.stdout
    line = done.stdout.replace("torchrun", f"'{sys.executable}' -m torch.distributed.run", 1)
    run = subprocess.run(["sh", "-c", line], env=environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian.py"], "did you mean 'train.py'?"),
        (["."], "is a directory"),
        (["--module", "no_such_module_here"], "no module no_such_module_here"),
        (["--nproc", "many", "train.py"], "no number of processes"),
        (["--nproc", "0", "train.py"], "no number of processes"),
        (["--nnodes", "2", "train.py"], "a place to meet"),
        (["--nnodes", "3:2", "train.py"], "no number of nodes"),
        (["--nnodes", "2", "--rdzv-endpoint", "host", "train.py"], "'host' is no place to meet"),
        (["--nnodes", "2", "--rdzv-endpoint", "host:1", "--node-rank", "2", "train.py"], "--node-rank 2 does not fit"),
        (["--node-rank", "0", "train.py"], "--node-rank 0 does not fit"),
    ],
)
def test_mistakes_exit_with_two_before_anything_starts(powertrain, tmp_path, arguments, words):
    """What cannot be launched is refused with a remedy and the exit code 2."""
    (tmp_path / "train.py").touch()
    done = powertrain("launch", *arguments)
    assert done.returncode == 2
    assert words in done.stderr and "to fix: " in done.stderr
    assert "Traceback" not in done.stderr


DEVICES = """
from powertrain.hookspecs import hookimpl
from powertrain.plugin import Plugin, Probe

class Three:
    def device_count(self):
        return 3

class ThePlugin(Plugin):
    name, api = {name!r}, 1

    def is_available(self):
        return Probe(True, "3 devices")

    @hookimpl
    def make_accelerator(self, name):
        return Three()
"""


def test_one_rank_a_device_by_default(powertrain, farm, tmp_path):
    """Without --nproc there is one rank for each device of an available accelerator; a broken probe counts as none."""
    (tmp_path / "train.py").touch()
    assert "--nproc-per-node=1 " in powertrain("launch", "--dry-run", "train.py").stdout
    keywords = "powertrain-plugin powertrain-accelerator"
    farm.add("angry", DEVICES.replace("return Probe", "raise OSError('stub') #"), keywords=keywords)
    farm.add("fast", DEVICES, keywords=keywords)
    done = powertrain("launch", "--dry-run", "train.py", farm=farm)
    assert "--nproc-per-node=3 " in done.stdout
    assert "'angry' is not counted: OSError: stub" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_script(powertrain, tmp_path):
    """A script that may not be read is refused before anything starts."""
    (tmp_path / "train.py").touch(mode=0)
    assert powertrain("launch", "train.py").returncode == 2


def test_torchrun_command_of_each_kind_of_launch():
    """The equivalent torchrun command names the same ranks, hosts and meeting point."""
    one = LaunchPlan(script="a.py", processes=4)
    assert one.torchrun()[1:] == ["--nproc-per-node=4", "--standalone", "--local-addr=127.0.0.1", "a.py"]
    elastic = LaunchPlan(script="a", is_module=True, nodes=(1, 3), endpoint="h:1", rendezvous_id="x", max_restarts=2)
    assert elastic.torchrun()[2:] == [
        "--nnodes=1:3",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=h:1",
        "--rdzv-id=x",
        "--max-restarts=2",
        "--module",
        "a",
    ]
    fixed = LaunchPlan(script="a.py", nodes=(2, 2), node_rank=1, endpoint="h:1")
    assert fixed.torchrun()[2:5] == ["--nnodes=2", "--node-rank=1", "--master-addr=h"]


def test_threads_are_shared_among_ranks(monkeypatch):
    """OMP_NUM_THREADS splits the cores, is at least one, and a value of the user's stays."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("powertrain.cli.launch_plan.cores", lambda: 8)
    assert rank_variables(3) == {"OMP_NUM_THREADS": "2", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    assert rank_variables(100)["OMP_NUM_THREADS"] == "1"
    assert rank_variables(1) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert rank_variables(3) == {"TORCH_CPP_LOG_LEVEL": "ERROR"}


def test_nodes_and_endpoints():
    """Node counts are N or MIN:MAX; an endpoint is a host and a port."""
    assert parse_nodes("3") == (3, 3)
    assert parse_nodes("1:4") == (1, 4)
    for text in ("0", "-1", "2:1", "a", "1:2:3", ""):
        with pytest.raises(LaunchError):
            parse_nodes(text)
    assert check_endpoint("[::1]:29400", (2, 2)) == "[::1]:29400"
    assert check_endpoint(None, (1, 1)) is None
    for text in ("host", ":1", "host:", "host:99999"):
        with pytest.raises(LaunchError):
            check_endpoint(text, (2, 2))
