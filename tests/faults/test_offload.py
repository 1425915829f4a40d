"""Runs whose state rests on a disk, and what ends them: kills, signals, a full disk, a broken one, a file cut short."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import powertrain
from powertrain.errors import TransferFailed

SCRIPT = """
import errno, os, resource, sys
from pathlib import Path

import torch
import powertrain
from powertrain_offload.io import file, part

place, saved, fault, engine_name = sys.argv[1:5]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(96, 96) for _ in range(6))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        for number, layer in enumerate(self.layers):
            if fault == "forward" and (self.passes, number) == (3, 3):
                stop()
            x = x + torch.tanh(layer(x))
        return x


def stop():
    print("stopped", flush=True)
    sys.stdin.read()  # until it is ended


def stop_at_a_write():
    real, calls = file.StripedFile.write, []

    def write(self, offset, data):
        moving = real(self, offset, data)
        calls.append(offset)
        if len(calls) == 100:  # in the third step, with writes under way
            stop()
        return moving

    file.StripedFile.write = write


def break_it():
    if fault == "full":
        descriptor = os.open(f"{place}/filler-{os.getpid()}", os.O_WRONLY | os.O_CREAT)
        try:
            while True:
                os.write(descriptor, bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            os.fsync(descriptor)
    elif fault == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    elif fault == "vanish":
        os.truncate(sys.argv[5], 0)
    elif fault == "cut":
        engine.context.tier("optimizer").settle()
        for number in os.listdir("/proc/self/fd"):
            try:
                name = os.readlink(f"/proc/self/fd/{number}")
            except OSError:
                continue
            if "powertrain-swap" in name:
                os.ftruncate(int(number), 5000)
                break


if fault == "full":
    part._fallocate = lambda *_: errno.EOPNOTSUPP  # as on file systems that set no space aside
if fault == "write":
    stop_at_a_write()

torch.manual_seed(0)
config = {
    "zero": {"stage": 3},
    "optimizer": {"lr": 1e-3},
    "communicator": {"timeout": 20},
    "batch": {"micro": 8},
    "offload": {
        "optimizer": "nvme", "gradients": "nvme", "parameters": "nvme", "path": place, "grain": 4096,
        "engine": engine_name, "buffers": 1 << 20,
    },
}
with powertrain.initialize(Model(), config, loss_fn=torch.nn.functional.mse_loss) as engine:
    if fault != "save":
        engine.load_checkpoint(saved)
    batch = torch.randn(8, 96), torch.randn(8, 96)
    for step in range(4):
        if fault in ("full", "limit") and step == 0 or fault in ("vanish", "cut") and step == 2:
            break_it()
        engine.train_step(batch)
    if fault == "save":
        engine.save_checkpoint(saved)
    print(f"finished after {engine.global_step} steps", flush=True)
"""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Run:
    """A script in a directory, and where its state and its checkpoints go."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place, self.saved = directory / "swap", directory / "saved"
        self.place.mkdir()
        (directory / "train.py").write_text(SCRIPT)

    def command(self, fault: str, *, ranks: int = 0, engine: str = "auto", image: str = "-") -> list[str]:
        """Return what starts it, with plain Python or the launcher."""
        start = ["-m", "powertrain.cli", "launch", "--nproc", str(ranks)] if ranks else []
        return [sys.executable, *start, "train.py", str(self.place), str(self.saved), fault, engine, image]

    def run(self, fault: str, *before: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            [*before, *self.command(fault, **more)],
            capture_output=True, text=True, timeout=200, cwd=self.directory, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def save(self) -> None:
        """Leave a checkpoint of four steps."""
        done = self.run("save")
        assert done.returncode == 0, done.stderr

    def check_next_start(self) -> None:
        """The checkpoint loads, and a run goes on from it; nothing of the run before is in its way."""
        done = self.run("none")
        assert done.returncode == 0, done.stderr
        assert "finished after 8 steps" in done.stdout
        assert not list(self.place.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path)
    made.save()
    return made


# --- killed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["forward", "write"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_whatever_ends_a_run_leaves_no_file(run: Run, number: signal.Signals, moment: str) -> None:
    """In the middle of forward, and of the update with writes under way; the next start goes on."""
    process = subprocess.Popen(
        run.command(moment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=run.directory, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n", process.communicate()[1]
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (-number, 1), told
    assert process.returncode == -number or "KeyboardInterrupt" in told
    assert not list(run.place.iterdir())
    run.check_next_start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_launch_that_is_ended_leaves_no_file(run: Run, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM of the launcher end all ranks, in words."""
    process = subprocess.Popen(
        run.command("forward", ranks=2), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=run.directory, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert "stopped" in process.stdout.readline()
        process.send_signal(number)
        _, told = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number), told
    assert "Traceback" not in told
    assert not list(run.place.iterdir())


# --- a disk that fails in mid-run ----------------------------------------------------------------------


def check_told(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The run has ended with the file, and expected and actual bytes, and without a traceback."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "finished" not in done.stdout
    for word in ("[PT806]", "powertrain-swap-", "expected: ", " bytes ", "bytes before it failed", "to fix: ", *words):
        assert word in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr


@pytest.mark.parametrize(("engine", "ranks"), [("uring", 2), ("direct", 1), ("threads", 1)])
def test_a_file_that_may_not_grow(run: Run, engine: str, ranks: int) -> None:
    """The system's limit on file sizes stands for a full disk, which needs a file system of its own."""
    check_told(run.run("limit", ranks=ranks, engine=engine), "EFBIG", "ulimit -f")
    assert not list(run.place.iterdir())
    run.check_next_start()


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_a_file_that_was_cut_short(run: Run, engine: str) -> None:
    """A short read is never taken for content."""
    check_told(run.run("cut", ranks=1, engine=engine), "the file ended", "see whether something cut it")
    run.check_next_start()


@pytest.fixture
def small_disk(run: Run) -> list[str]:
    """Return what runs a command with a file system of 40 MB mounted over the directory, for that command alone."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None or shutil.which("unshare") is None:
        pytest.skip("mounting needs root and mkfs.ext4; test_a_file_that_may_not_grow and test_a_broken_disk do not")
    image = run.directory / "image"
    with image.open("wb") as file:
        file.truncate(40_000_000)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True, timeout=60)
    mount = f"mount -o loop '{image}' '{run.place}' && rmdir '{run.place}/lost+found'"
    tried = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, timeout=60)
    if tried.returncode:
        pytest.skip(f"mounting is refused here ({tried.stderr.strip()}); the tests beside this one need no mount")
    # Whatever the run leaves in the directory is told, before its mount goes with it.
    script = f'{mount}; "$@"; code=$?; ls -A "{run.place}" | grep -v filler >&2; exit $code'
    return ["unshare", "-m", "sh", "-c", script, "sh"]


@pytest.mark.parametrize(("engine", "ranks"), [("uring", 1), ("direct", 2)])
def test_a_disk_that_is_full(run: Run, small_disk: list[str], engine: str, ranks: int) -> None:
    """Somebody else takes the last byte in mid-run: the error names file and bytes, and nothing of ours stays."""
    done = run.run("full", *small_disk, ranks=ranks, engine=engine)
    check_told(done, "No space left on device (ENOSPC)", "resume from the last checkpoint")
    assert not any(line.startswith("powertrain-swap") for line in done.stderr.splitlines())
    run.check_next_start()


def test_a_disk_that_vanishes(run: Run, small_disk: list[str]) -> None:
    """The device below a mounted file system is gone: what is read or written next is an error, not zeros."""
    done = run.run("vanish", *small_disk, ranks=1, image=str(run.directory / "image"))
    check_told(done, "(EIO)")
    run.check_next_start()


# --- failures in the background ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize(
    "categories", [("optimizer",), ("optimizer", "gradients", "parameters"), ("parameters",)], ids=str
)
def test_a_transfer_that_failed_raises_within_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, categories: tuple[str, ...], kind: str
) -> None:
    """One of a worker's transfers fails, once, while nobody waits for it: a step raises, at the latest the next."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    table = dict.fromkeys(categories, "nvme") | {"path": str(tmp_path), "engine": "threads", "grain": 4096}
    batch = torch.randn(4, 64), torch.randn(4, 64)
    name = "preadv" if kind == "read" else "pwrite"
    real, left = getattr(os, name), [0]

    def fails_once(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return int(real(*arguments))

    monkeypatch.setattr(os, name, fails_once)
    config = {"zero": {"stage": 3}, "offload": table}
    steps = 0
    with (
        pytest.raises(TransferFailed, match=r"\(EIO\)") as caught,
        powertrain.initialize(model, config, loss_fn=torch.nn.functional.mse_loss) as engine,
    ):
        engine.train_step(batch)
        left[0] = 3
        for _ in range(2):
            engine.train_step(batch)
            steps += 1
    assert steps <= 1
    assert "powertrain-swap" in str(caught.value.where)
    assert "bytes before it failed" in str(caught.value.found)
    assert not list(tmp_path.iterdir())
